"""Trackers get every row and nothing but numbers; one that is missing, refused or lost is said, and never costs a run."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import api
from finetune.config.schema import Tracking
from finetune.errors import ConfigError, HardwareError
from finetune.training.metrics import Evaluated, Event, StepDone, TrackerLost
from finetune.training.tracking import require_trackers, scalars

STEP = StepDone(3, 0.5, 1.25, 0.1, {"mlp": 0.01, "attention": 0.005}, 100, 60, 2.0, 0.01, 2**30)
TRAIN = {"max_steps": 3, "batch_size": 4, "precision": "fp32", "samples": {"max_tokens": 3}}
CANARIES = {
    "WANDB_API_KEY": "CANARY" * 7,
    "HF_TOKEN": "hf_CANARYCANARYCANARY",
    "MLFLOW_TRACKING_PASSWORD": "CANARYPASSWORD",
    "MY_SECRET": "CANARYSECRET",
}
SERVICES = ("wandb", "mlflow", "trackio")
# What these packages are asked for through accelerate, written down; they fail where they are told to.
FAKE = """
import json, os
class Error(Exception):
    pass
MlflowException = Error
def note(what, **said):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps({"service": __name__.split(".")[0], "what": what, **said}, default=str) + chr(10))
    if os.environ.get("FAKE_FAILS") == what:
        raise Error("no route to https://somebody:CANARYPASSWORD@example.org" + chr(10) + "CANARYSECRET")
class Run:
    class info:
        run_id = "r1"
    def log(self, values, step=None):
        note("log", values=values, step=step)
    def finish(self):
        note("finish")
def init(**options):
    print("where to look")
    note("start", options=options)
    return Run()
def search_experiments(filter_string):
    return []
def create_experiment(name, artifact_location, tags):
    return "e1"
def set_tracking_uri(uri):
    pass
def start_run(**options):
    note("start", options=options)
    return Run()
def log_metrics(metrics, step):
    note("log", values=metrics, step=step)
def end_run():
    note("finish")
"""


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Installs the three fakes; what they were told."""
    for name, module in (("wandb", "errors"), ("mlflow", "exceptions"), ("trackio", "errors")):
        package = tmp_path / "site" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(FAKE)
        (package / f"{module}.py").write_text(f"from {name} import Error, MlflowException")
        for loaded in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, loaded)
    (tmp_path / "site" / "httpx.py").write_text("from trackio import Error as HTTPError")
    monkeypatch.delitem(sys.modules, "httpx", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    log = tmp_path / "told.jsonl"
    monkeypatch.setenv("FAKE_LOG", str(log))
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["finetune", "train", "CANARYARGUMENT"])
    yield lambda: [json.loads(line) for line in log.read_text().splitlines()]
    for name in ("wandb", "mlflow", "trackio", "httpx"):
        for loaded in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
            del sys.modules[loaded]


def chat(path: Path) -> str:
    rows = [{"question": f"CANARYQUESTION {number}", "answer": f"CANARYANSWER {number}"} for number in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def write(*services: str) -> Path:
        data = {"train": [{"source": chat(tmp_path / "chat.jsonl")}], "validation": {"fraction": 0.25}}
        return write_config(data=data, train=TRAIN, tracking=dict.fromkeys(services, True) | {"project": "cancer"})

    return write


def follow(config: Path, *overrides: str, resume: bool = False) -> list[Event]:
    events: list[Event] = []
    api.train(api.load_config(config, overrides).config, events.append, resume=resume)
    return events


# --- what is sent --------------------------------------------------------------------------------------------------------------------


def test_rows_become_numbers_by_kind() -> None:
    found = scalars(STEP)
    assert found["train/loss"] == 1.25
    assert found["learning_rate/mlp"] == 0.01
    assert scalars(Evaluated(3, 2.5, 0.1, best=True)) == {"validation/validation_loss": 2.5, "validation/seconds": 0.1}


def test_names_of_groups_are_such_that_every_service_takes_them_apart() -> None:
    rates = {"(rest)": 1.0, "(rest), no decay": 2.0, "a b": 3.0, "a_b": 4.0, "\u00e9": 5.0}
    found = scalars(StepDone(1, 0.5, 1.0, 0.1, rates, 1, 1, 1.0, 0.0, 1))
    named = {name.removeprefix("learning_rate/"): value for name, value in found.items() if name.startswith("learning_rate/")}
    assert named == {"rest": 1.0, "rest_no_decay": 2.0, "a_b": 3.0, "a_b_3": 4.0, "group": 5.0}


def test_c3_services_are_told_numbers_and_no_secret_text_or_setting(
    config: Callable[..., Path], services: Callable[[], list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = follow(config(*SERVICES, "tensorboard"))
    assert capsys.readouterr().out == "", "what services print is no result"
    assert any(isinstance(event, StepDone) for event in events)
    told = services()
    for service in SERVICES:
        mine = [row for row in told if row["service"] == service]
        assert [row["what"] for row in mine] == ["start", "log", "log", "log", "log", "finish"], service
        assert [row["step"] for row in mine[1:-1]] == [1, 2, 3, 3]
        assert all(type(value) is float for row in mine[1:-1] for value in row["values"].values())
        assert "run" in json.dumps(mine[0])  # the last part of `output`
    kept = [tmp_path / "told.jsonl", *(tmp_path / "run").rglob("*")]
    leaking = [path.name for path in kept if path.is_file() and b"CANARY" in path.read_bytes()]
    assert set(leaking) <= {"metrics.jsonl", "report.html"}, "samples are text of the data, which stays in the run"
    assert b"CANARYS" not in (tmp_path / "run" / "metrics.jsonl").read_bytes()


def test_a_resumed_run_goes_on_with_the_runs_that_it_began(
    config: Callable[..., Path], services: Callable[[], list[dict[str, Any]]]
) -> None:
    follow(config(*SERVICES))
    follow(config(*SERVICES), "train.max_steps=5", "train.epochs=2", resume=True)
    starts = {
        service: [row["options"] for row in services() if row["what"] == "start" and row["service"] == service] for service in SERVICES
    }
    assert starts["wandb"][0]["id"] == starts["wandb"][1]["id"]
    assert [options["run_id"] for options in starts["mlflow"]] == [None, "r1"]
    assert [options["resume"] for options in starts["trackio"]] == ["never", "allow"]
    assert [row["step"] for row in services() if row["what"] == "log" and row["service"] == "wandb"] == [1, 2, 3, 3, 4, 5, 5]


def test_tensorboard_files_hold_the_losses(train_here: Callable[..., Any], write_config: Callable[..., Path], tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_here(write_config(tracking={"tensorboard": True}, train={"max_steps": 3, "batch_size": 4, "precision": "fp32"}))
    log = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    assert [point.step for point in log.Scalars("train/loss")] == [1, 2, 3]


# --- what cannot be --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", *SERVICES])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(HardwareError, match=f"{name} is not installed") as caught:
        require_trackers(Tracking(**{name: True}))
    assert f"finetune[{name}]" in caught.value.problems[0].fix
    require_trackers(Tracking())


@pytest.mark.usefixtures("services")
def test_wandb_without_a_login_is_refused_before_it_could_ask_for_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tracking = Tracking(wandb=True)
    require_trackers(tracking)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="nobody is logged in") as caught:
        require_trackers(tracking)
    assert "wandb login" in caught.value.problems[0].fix
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_trackers(tracking)
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    require_trackers(tracking)


@pytest.mark.usefixtures("services")
def test_a_service_that_cannot_be_reached_at_the_start_is_an_error_with_a_way_on(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "start")
    with pytest.raises(HardwareError, match="wandb cannot be started: no route") as caught:
        follow(config("wandb"))
    problem = caught.value.problems[0]
    assert "CANARY" not in f"{problem.what} {problem.where} {problem.fix}"
    assert "-o tracking.wandb=false" in problem.fix
    events = follow(config("wandb"), "tracking.wandb=false", resume=True)
    assert any(isinstance(event, StepDone) for event in events)


@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("moment", ["log", "finish"])
def test_a_service_that_is_lost_is_told_once_and_the_run_goes_on(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setenv("FAKE_FAILS", moment)
    events = follow(config("mlflow", "trackio"))
    lost = [event for event in events if isinstance(event, TrackerLost)]
    assert [event.name for event in lost] == ["mlflow", "trackio"]
    assert all(event.reason == "no route to https://***@example.org" for event in lost)
    assert sum(isinstance(event, StepDone) for event in events) == 3
