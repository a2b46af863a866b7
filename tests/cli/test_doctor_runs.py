"""`finetune doctor RUN` on directories that training wrote: finished, killed, failed, damaged."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import api
from finetune.errors import ConfigError, DataError, DivergedError, VerificationError
from finetune.reporting.doctor import RULES, read_diagnosis
from finetune.runs import RunDirectory
from finetune.sealed import read_json, write_json


def write_rows(path: Path, answer: str, count: int = 40) -> Path:
    words = ("gout", "angina", "asthma", "mumps", "sepsis")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Number {number}?"},
                {"role": "assistant", "content": answer.format(words[number % 5])},
            ]
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable[..., Path]) -> Path:
    """A run of 28 steps at a rate that teaches nothing, with attention at a two-hundredth of it."""
    folder = tmp_path_factory.mktemp("doctor")
    config = {
        "model": {"id": str(make_tiny_model(seed=5))},
        "tuning": {"method": "lora", "rank": 4, "alpha": 8},
        "optimizer": {"learning_rate": 1e-5, "groups": {"attention": {"lr_ratio": 0.005}}},
        "data": {"train": [{"source": str(write_rows(folder / "rows.jsonl", "It is {}."))}], "validation": {"fraction": 0.45}},
        "train": {"epochs": 7, "batch_size": 5, "max_steps": 28, "precision": "fp32", "evaluate": {"every_steps": 14}},
        "output": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    return api.train(api.load_config(folder / "run.yaml").config).path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_diagnosed_from_its_files(copied: Path, call: Callable[..., Any]) -> None:
    done = call("doctor", copied, "--json")
    assert done.code == 0
    shown = json.loads(done.out)
    assert shown == read_json(copied / "doctor.json")
    assert {finding["rule"] for finding in shown["findings"]} == {"flat-loss", "dead-groups"}
    assert (shown["state"], shown["steps"], shown["planned_steps"]) == ("finished", 28, 28)
    assert set(shown["ran"]) | set(shown["not_run"]) == {rule.name for rule in RULES}
    assert "finetune eval" in shown["not_run"]["forgetting"]
    diagnosis = read_diagnosis(RunDirectory(copied))
    assert diagnosis is not None
    assert diagnosis.as_dict() == json.loads(json.dumps(shown)) | {
        "findings": diagnosis.as_dict()["findings"],
        "ran": diagnosis.ran,
        "notes": diagnosis.notes,
    }


def test_the_changes_of_a_real_run_are_valid_for_it(copied: Path) -> None:
    before = api.load_config(copied / "config.yaml").config
    overrides = [override for finding in api.diagnose(copied).findings for override in finding.overrides]
    after = api.load_config(copied / "config.yaml", overrides).config
    assert after.optimizer.learning_rate == pytest.approx(10 * before.optimizer.learning_rate)
    assert after.optimizer.groups["attention"].lr_ratio == 1.0


def test_the_screen_has_80_columns(copied: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.cli import view

    monkeypatch.setattr(view, "out", view.Console(highlight=False, soft_wrap=True, width=80))
    monkeypatch.chdir(copied.parent)
    shown = call("doctor", "run").out
    for text in (
        "problem   flat-loss: ",
        "figures   ",
        "reason    ",
        "change    -o optimizer.learning_rate=0.0001",
        "ran       ",
        "not run   ",
    ):
        assert text in shown, text
    assert max(len(line) for line in shown.splitlines() if not line.startswith("change ")) <= 80


def test_a_change_is_one_line_however_narrow_the_screen(copied: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.cli import view

    monkeypatch.setattr(view, "out", view.Console(highlight=False, soft_wrap=True, width=40))
    shown = call("doctor", copied).out
    findings = api.diagnose(copied).findings
    for finding in findings:
        assert " ".join(f"-o {shlex.quote(override)}" for override in finding.overrides) in shown


def test_a_healthy_run_is_as_well_as_the_rules_that_could_run(
    copied: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = call("doctor", copied, "--json").out
    count = len(json.loads(shown)["ran"])
    diagnosis = replace(api.diagnose(copied), findings=())
    monkeypatch.setattr(api, "diagnose", lambda *_: diagnosis)
    assert f"nothing wrong was found by the {count} rules that could run" in call("doctor", copied).out


def test_a_damaged_line_of_metrics_is_told_and_passed_over(copied: Path, call: Callable[..., Any]) -> None:
    rows = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join([*rows[:3], "{torn\n", *rows[3:]]))
    done = call("doctor", copied)
    assert done.code == 0
    assert "line 4 is no JSON" in " ".join(done.out.split())
    with pytest.raises(VerificationError, match="no JSON"):
        api.report(copied)


def test_a_run_that_has_hardly_begun_is_diagnosed_without_torch(copied: Path) -> None:
    shutil.rmtree(copied / "adapter")
    rows = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(rows[:4]) + rows[4][:20])  # killed while it wrote the fifth row
    code = "import sys\nfrom finetune.cli.app import app\napp(sys.argv[1:], standalone_mode=False)\nassert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code, "doctor", str(copied)], check=True, capture_output=True, text=True)
    assert "unfinished, 4 of 28 steps" in done.stdout
    assert "the run is not finished: it has no adapter" in done.stdout


def test_a_run_that_diverged_says_so(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = torch.nn.utils.clip_grad_norm_
    config = api.load_config(copied / "config.yaml", [f"output={copied.parent / 'lost'}", "train.max_steps=4"]).config
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *rest, **options: clip(*rest, **options) * float("nan"))
        with pytest.raises(DivergedError):
            api.train(config)
    session = read_json(copied.parent / "lost" / "environment.json")["sessions"][-1]
    assert session["failed"]["error"] == "DivergedError"
    assert "not finite in step 1" in session["failed"]["what"]
    diagnosis = api.diagnose(copied.parent / "lost")
    assert (diagnosis.state, diagnosis.steps) == ("failed", 0)
    assert [finding.rule for finding in diagnosis.findings if finding.severity == "problem"] == ["rate-too-high", "dead-groups"]
    api.train(config, resume=True)
    assert api.diagnose(copied.parent / "lost").state == "finished"


def test_a_damaged_adapter_leaves_the_curves(copied: Path) -> None:
    """A run whose result is not what was saved has none; the other rules go on."""
    weights = copied / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    diagnosis = api.diagnose(copied)
    assert diagnosis.state == "unfinished"
    assert "saturated-adapter" in diagnosis.not_run
    assert "flat-loss" in diagnosis.ran


@pytest.mark.parametrize("name", ["plan.json", "doctor.json"])
def test_a_damaged_record_is_an_error(copied: Path, name: str) -> None:
    write_json(copied / name, {"steps": {"total": 28}})
    with pytest.raises(VerificationError) as caught:
        api.diagnose(copied) if name == "plan.json" else read_diagnosis(RunDirectory(copied))
    assert str(copied) in caught.value.problems[0].where


def test_newer_data_is_compared_with_validation(copied: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    """A base that learned nothing has lost nothing on other rows either: no drift, but the figures."""
    newer = write_rows(tmp_path / "new.jsonl", "zzz {} zzz", 12)
    shown = json.loads(call("doctor", copied, "--against", newer, "--json").out)
    assert "drift" in shown["ran"]
    assert "drift" not in {finding["rule"] for finding in shown["findings"]}
    assert shown["drift"]["newer rows"] == 12
    low, high = (shown["drift"][f"difference of the losses, {end}"] for end in ("low", "high"))
    assert low < shown["drift"]["loss on newer rows"] - shown["drift"]["loss on validation rows"] < high
    refused = call("doctor", copied, "--against", "nope.jsonl")
    assert refused.code == 3
    assert "starts at the working directory" in refused.err
    with pytest.raises(DataError, match="3 rows are too few"):
        api.diagnose(copied, write_rows(tmp_path / "few.jsonl", "{}", 3))


def test_too_few_validation_rows_are_those_of_the_run(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.evaluation import drift

    monkeypatch.setattr(drift, "_LEAST_ROWS", 20)
    with pytest.raises(DataError, match="the run has 18 validation rows") as caught:
        api.diagnose(copied, write_rows(tmp_path / "new.jsonl", "{}", 30))
    assert caught.value.problems[0].where == str(copied)
    assert "data.validation" in caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("arguments", "what"),
    [((), "it is not said"), (("RUN", "--machine"), "not at a run"), (("--machine", "--against", "x"), "not at a run")],
)
def test_either_a_run_or_the_machine(arguments: tuple[str, ...], what: str, call: Callable[..., Any]) -> None:
    done = call("doctor", *arguments)
    assert done.code == 2
    assert what in done.err


def test_newer_data_needs_a_run_that_was_validated(copied: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied / "adapter")
    with pytest.raises(ConfigError, match="not finished"):
        api.diagnose(copied, write_rows(tmp_path / "new.jsonl", "{}"))
