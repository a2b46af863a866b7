"""Killed, interrupted, out of disk, damaged: what happens to a run, and that it goes on to the same bytes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import api
from finetune.errors import ConfigError, DivergedError, FinetuneError, HardwareError, RunInterruptedError, VerificationError
from finetune.model import computed_start
from finetune.scoring import Scorer
from finetune.sealed import read_json, verify
from finetune.training import build, inputs, train
from finetune.training import export as exporting
from finetune.training.metrics import AlreadyFinished, CheckpointDamaged, Event, Started
from tests.outcome import result, rows

ROOT = Path(__file__).parents[2]
TRAIN = {
    "epochs": 2,
    "batch_size": 4,
    "precision": "fp32",
    "tokens_per_device": 128,
    "checkpoint": {"every_steps": 2, "keep": 2},
    "evaluate": {"every_steps": 3},
}
DROPOUT = {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.2}


def settings(output: Path, model: Path, chat: Path, **sections: object) -> Path:
    path = output.with_name(f"{output.name}.yaml")
    given = {
        "model": {"id": str(model)},
        "tuning": DROPOUT,
        "optimizer": {"learning_rate": 0.01},
        "data": {"train": [{"source": str(chat)}], "validation": {"fraction": 0.2}, "max_tokens": 256},
        "train": TRAIN,
        "output": str(output),
    }
    path.write_text(json.dumps(given | sections))
    return path


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, chat_file: Path) -> Path:
    """A run that nothing happened to, with all its checkpoints."""
    output = tmp_path_factory.mktemp("straight") / "run"
    kept = {**TRAIN, "checkpoint": {"every_steps": 2, "keep": 50}}
    go(settings(output, tiny_model_dir, chat_file, train=kept))
    return output


@pytest.fixture
def halfway(straight: Path, tmp_path: Path) -> Path:
    """A copy of it that lost everything after its sixth step."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "adapter")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > 6:
            shutil.rmtree(checkpoint)
    return run


def go(config: Path, *overrides: str, events: list[Event] | None = None, resume: bool = False, accept: tuple[str, ...] = ()) -> Path:
    watch = (events if events is not None else []).append
    return api.train(api.load_config(config, overrides).config, watch, resume=resume, accept=accept).path


def resume(run: Path, *overrides: str, events: list[Event] | None = None, accept: tuple[str, ...] = ()) -> Path:
    return go(run / "config.yaml", f"output={run}", *overrides, events=events, resume=True, accept=accept)


def require_equal(run: Path, straight: Path) -> None:
    """The run came to what the other came to, and nothing temporary is left."""
    assert result(run) == result(straight)
    assert rows(run) == rows(straight)
    assert [path for path in run.rglob(".*") if path.name != ".lock"] == []


# --- SIGKILL -------------------------------------------------------------------------------------------------------------------------


def test_d1_killed_anywhere_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """The short form of `make torture`: calls of a checkpoint's write, calls of the main thread, random times."""
    out = tmp_path / "torture.json"
    command = [
        sys.executable,
        str(ROOT / "tests" / "torture" / "harness.py"),
        str(out),
        "--calls",
        "3",
        "--main-calls",
        "3",
        "--random",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["points"] == 8
    assert found["kills"] >= 6
    assert found["failed"] == []


# --- signals -------------------------------------------------------------------------------------------------------------------------

PHASES = ("preparation", "loading", "loftq", "a step", "evaluation", "export")


def after_calls(real: Callable[..., Any], number: int, calls: int = 1) -> Callable[..., Any]:
    """``real``, which gets a signal in its call number ``calls``."""
    count = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            signal.raise_signal(number)
        return real(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("phase", PHASES)
def test_b2_a_signal_is_seen_in_every_phase(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir: Path, chat_file: Path, phase: str
) -> None:
    number, code = (signal.SIGINT, 130) if phase in ("preparation", "evaluation") else (signal.SIGTERM, 143)
    number = signal.SIGUSR1 if phase == "a step" else number
    sections: dict[str, object] = {}
    if phase == "loftq":
        rank = 2 + int(time.time()) % 3  # a start that the cache does not hold
        tuning = {**DROPOUT, "rank": rank, "init": {"method": "loftq", "iterations": 2}}
        sections = {"quantization": {"method": "nf4", "double_quant": False}, "tuning": tuning}
    config = settings(tmp_path / "run", tiny_model_dir, chat_file, **sections)
    owner, name, calls = {
        "preparation": (inputs, "prepare", 1),
        "loading": (build, "load_base", 1),
        "loftq": (computed_start, "return_freed_memory", 3),
        "a step": (torch.nn.utils, "clip_grad_norm_", 4),
        "evaluation": (Scorer, "total_loss", 2),
        "export": (exporting, "save", 1),
    }[phase]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, after_calls(getattr(owner, name), number, calls))
        with pytest.raises(RunInterruptedError) as caught:
            go(config)
    problem = caught.value.problems[0]
    assert caught.value.exit_code == code
    run, begun = tmp_path / "run", phase in ("a step", "evaluation", "export")
    assert (run / "environment.json").exists() == begun
    assert ("--resume" in problem.fix) == begun
    assert not (run / "adapter").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(Path(os.environ["FINETUNE_CACHE"]).rglob("*.tmp"))
    step = {"a step": 4, "evaluation": 6, "export": 10}.get(phase)
    if step is not None:
        verify(run / "checkpoints" / f"step-{step:08d}")
    go(config, resume=begun)
    whole = go(settings(tmp_path / "whole", tiny_model_dir, chat_file, **sections))
    require_equal(run, whole)


def test_b2_a_signal_while_libraries_load_and_a_second_one_while_it_trains(tmp_path: Path, tiny_model_dir: Path, chat_file: Path) -> None:
    config = settings(tmp_path / "run", tiny_model_dir, chat_file, train={**TRAIN, "epochs": 4000, "checkpoint": {"every_steps": 20000}})
    process = start(config)
    wait_for(lambda: "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in err) == (143, False), err
    assert not (tmp_path / "run").exists()
    process = start(config)
    figures = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: figures.exists() and figures.stat().st_size > 0, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (130, 143), err
    assert "Traceback" not in err
    steps = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert steps
    for step in steps:
        verify(step)


def test_a_closed_terminal_saves_a_checkpoint_as_sigterm_does(tmp_path: Path, tiny_model_dir: Path, chat_file: Path) -> None:
    config = settings(tmp_path / "run", tiny_model_dir, chat_file, train={**TRAIN, "epochs": 4000, "checkpoint": {"every_steps": 20000}})
    process = start(config, "-c", HEARS_HANGUP)
    figures = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: figures.exists() and figures.stat().st_size > 0, process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "--resume" in err
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    verify(newest)
    steps = [row["step"] for row in map(json.loads, figures.read_text().splitlines()) if row["kind"] == "step"]
    assert newest.name == f"step-{steps[-1]:08d}"


@pytest.mark.parametrize("where", ["stderr", "stdout"])
def test_a_run_whose_messages_nobody_reads_goes_on(tmp_path: Path, tiny_model_dir: Path, chat_file: Path, where: str) -> None:
    """As under `| head` or a `tee` that Ctrl-C has ended."""
    process = start(settings(tmp_path / "run", tiny_model_dir, chat_file))
    read, other = (process.stderr, process.stdout) if where == "stderr" else (process.stdout, process.stderr)
    assert read is not None
    assert other is not None
    read.close()
    rest = other.read()
    assert process.wait(timeout=120) == 0, rest
    verify(tmp_path / "run" / "adapter")


HEARS_HANGUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Under nohup SIGHUP is ignored, and by all children too."""


def start(config: Path, *before: str) -> subprocess.Popen[str]:
    """``before``: options of Python that come first."""
    command = [sys.executable, *before, "-m", "finetune", "train", str(config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


# --- damage --------------------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "flipped bit": ("adapter_model.safetensors", flip, "sha256"),
    "truncated": ("optimizer.safetensors", lambda path: os.truncate(path, 100), "sha256"),
    "missing": ("state.json", lambda path: path.unlink(), "missing"),
    "no manifest": ("MANIFEST.json", lambda path: path.unlink(), "MANIFEST.json"),
    "extra": ("training_args.bin", lambda path: path.write_bytes(b"x"), "the manifest does not name it"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_b1_a_damaged_checkpoint_is_told_of_and_the_one_before_it_resumes(halfway: Path, straight: Path, damage: str) -> None:
    name, act, reason = DAMAGE[damage]
    newest = halfway / "checkpoints" / "step-00000006"
    act(newest / name)
    events: list[Event] = []
    resume(halfway, events=events)
    told = [event for event in events if isinstance(event, CheckpointDamaged)]
    assert [event.path for event in told] == [newest]
    assert reason in told[0].reason
    assert told[0].aside.is_dir()
    started = next(event for event in events if isinstance(event, Started))
    assert 0 < started.done < 6
    require_equal(halfway, straight)


def test_b1_no_intact_checkpoint_is_an_error_that_changes_nothing(halfway: Path) -> None:
    for weights in halfway.glob("checkpoints/*/adapter_model.safetensors"):
        flip(weights)
    before = sorted(halfway.rglob("*"))
    with pytest.raises(VerificationError, match="no checkpoint of this run is intact") as caught:
        resume(halfway)
    assert caught.value.exit_code == 6
    assert sorted(halfway.rglob("*")) == before


def test_b3_nan_ends_the_run_and_the_last_checkpoint_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir: Path, chat_file: Path, straight: Path
) -> None:
    config = settings(tmp_path / "run", tiny_model_dir, chat_file)
    norms = iter((1.0, 1.0, 1.0, 1.0, float("nan")))
    clip = torch.nn.utils.clip_grad_norm_
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *rest, **options: clip(*rest, **options) * next(norms))
        with pytest.raises(DivergedError, match="not finite in step 5") as caught:
            go(config)
    assert caught.value.exit_code == 5
    assert not (tmp_path / "run" / "adapter").exists()
    go(config, resume=True)
    require_equal(tmp_path / "run", straight)


# --- the disk ------------------------------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the block no file grows beyond ``size`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("moment", ["before the first step", "with the optimizer's first states"])
def test_b7_a_full_disk_ends_the_run_and_what_was_saved_resumes(
    tmp_path: Path, tiny_model_dir: Path, chat_file: Path, straight: Path, moment: str
) -> None:
    config, run = settings(tmp_path / "run", tiny_model_dir, chat_file), tmp_path / "run"
    adapter = (straight / "checkpoints" / "step-00000000" / "adapter_model.safetensors").stat().st_size
    size = adapter - 1000 if moment == "before the first step" else adapter + 5000
    with largest_file(size), pytest.raises(HardwareError, match="cannot write: ") as caught:
        go(config)
    assert caught.value.exit_code == 4
    assert caught.value.problems[0].fix
    assert not list(run.rglob("*.tmp"))
    kept = [path.name for path in (run / "checkpoints").iterdir()]
    assert kept == ([] if moment == "before the first step" else ["step-00000000"])
    go(config, resume=True)
    require_equal(run, straight)


def test_b7_too_little_space_is_known_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir: Path, chat_file: Path
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 50_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(HardwareError, match=r"4 checkpoints .* need .* MiB, and 0.0 MiB are free") as caught:
            go(settings(tmp_path / "run", tiny_model_dir, chat_file))
    assert "train.checkpoint.keep" in caught.value.problems[0].fix
    assert not (tmp_path / "run").exists()


def test_a_place_where_nothing_can_be_made_is_said_to_be_one(tiny_model_dir: Path, chat_file: Path, tmp_path: Path) -> None:
    """Root may write into every directory but those of the kernel."""
    config = settings(tmp_path / "run", tiny_model_dir, chat_file)
    with pytest.raises(FinetuneError) as caught:
        go(config, "output=/proc/finetune-run")
    assert caught.value.exit_code in (2, 4)
    assert caught.value.problems[0].fix


def test_a_base_whose_card_cannot_be_read_is_refused_before_it_is_trained(
    make_tiny_model: Callable[..., Path], chat_file: Path, tmp_path: Path
) -> None:
    """The card of the result names the base's license; after the last step it is too late to say that nothing can be written."""
    base = make_tiny_model(seed=6)
    (base / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ConfigError, match="cannot read the metadata"):
        go(settings(tmp_path / "run", base, chat_file))
    assert not (tmp_path / "run").exists()


# --- what changed, and what is longer --------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_is_extended_only_when_asked(tmp_path: Path, tiny_model_dir: Path, chat_file: Path) -> None:
    """Under a constant rate, two epochs made three are three epochs bit by bit; the choice is recorded."""
    schedule, length = {"method": "constant", "warmup_steps": 2}, {**TRAIN, "evaluate": {"every_steps": 5}}
    config, run = settings(tmp_path / "run", tiny_model_dir, chat_file, train=length, schedule=schedule), tmp_path / "run"
    go(config)
    events: list[Event] = []
    go(config, resume=True, events=events)
    assert [type(event) for event in events] == [AlreadyFinished]
    with pytest.raises(ConfigError, match="lengthened, not shortened"):
        go(config, "train.epochs=1", resume=True)
    events = []
    go(config, "train.epochs=3", resume=True, events=events)
    notes = next(event for event in events if isinstance(event, Started)).notes
    assert any("extended from 10 to 15 steps" in note and "runs at 1 of the peak rate" in note for note in notes)
    longer = settings(tmp_path / "longer", tiny_model_dir, chat_file, train={**length, "epochs": 3}, schedule=schedule)
    require_equal(run, go(longer))
    session = read_json(run / "environment.json")["sessions"][-1]
    assert (session["from_step"], session["changes"]) == (10, [{"key": "train.epochs", "before": 2, "now": 3}])
    assert api.load_config(run / "config.yaml").config.train.epochs == 3
    assert read_json(run / "plan.json")["steps"]["total"] == 15


def test_an_extension_that_was_killed_is_not_finished(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)

    with pytest.raises(KeyboardInterrupt):
        api.train(api.load_config(run / "config.yaml", [f"output={run}", "train.epochs=3"]).config, die, resume=True)
    for use in (lambda: api.merge(run, tmp_path / "merged"), lambda: api.evaluate(run), lambda: api.analyze([run])):
        with pytest.raises(ConfigError, match="not finished: its adapter is that of a shorter run"):
            use()
    events: list[Event] = []
    resume(run, events=events)
    assert next(event for event in events if isinstance(event, Started)).steps.total == 15
    assert read_json(run / "adapter" / "training.json")["run_steps"] == 15
    steps = [row["step"] for row in rows(run) if row["kind"] == "step"]
    assert steps == list(range(1, 16))


def test_a_resumption_that_is_refused_changes_nothing(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "adapter")
    newest = run / "checkpoints" / "step-00000010"
    flip(newest / "adapter_model.safetensors")
    (run / ".lock").touch()

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = contents()
    events: list[Event] = []
    config = api.load_config(run / "config.yaml", [f"output={run}", "optimizer.learning_rate=0.0123"]).config
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate is 0\.0123"):
        api.train(config, events.append, resume=True)
    assert not [event for event in events if isinstance(event, CheckpointDamaged)]
    assert contents() == before
    events.clear()
    resume(run, events=events)
    assert [event.path for event in events if isinstance(event, CheckpointDamaged)] == [newest]


@pytest.mark.parametrize(("name", "fix"), [("lr", "one of"), ("learning_rate", "write optimizer.learning_rate"), ("seed", "one of")])
def test_what_cannot_be_accepted_is_named(tmp_path: Path, straight: Path, name: str, fix: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    config = api.load_config(run / "config.yaml", [f"output={run}", "train.epochs=3"]).config
    with pytest.raises(ConfigError, match=f"{name} is nothing that can be accepted") as caught:
        api.train(config, resume=True, accept=[name])
    assert fix in caught.value.problems[0].fix


def test_the_card_of_a_run_that_changed_says_so(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    assert "Changed on its way" not in (run / "adapter" / "README.md").read_text()
    config = api.load_config(run / "config.yaml", [f"output={run}", "train.epochs=3", "optimizer.learning_rate=0.005"]).config
    api.train(config, resume=True, accept=["optimizer.learning_rate"])
    text = (run / "adapter" / "README.md").read_text()
    assert "Changed on its way" in text
    assert "optimizer.learning_rate was" in text


def die(event: Event) -> None:
    """A kill once what changed is recorded, and before a step is done."""
    if isinstance(event, Started):
        raise KeyboardInterrupt


def test_a2_what_stopped_early_goes_on_where_its_patience_grew_and_nowhere_else(
    tmp_path: Path, tiny_model_dir: Path, chat_file: Path
) -> None:
    early = {**TRAIN, "evaluate": {"every_steps": 1}, "early_stopping": {"patience": 1, "min_delta": 1000.0}}
    run = go(settings(tmp_path / "run", tiny_model_dir, chat_file, train=early))
    assert read_json(run / "adapter" / "training.json")["run_steps"] == 2
    with pytest.raises(ConfigError, match="nothing more to do") as caught:
        resume(run, "train.epochs=3")
    assert "patience" in caught.value.problems[0].fix
    patient = ["train.early_stopping.patience=3", f"output={run}"]
    with pytest.raises(KeyboardInterrupt):
        api.train(api.load_config(run / "config.yaml", patient).config, die, resume=True, accept=("train.early_stopping",))
    resume(run)
    assert read_json(run / "adapter" / "training.json")["run_steps"] == 4
    events: list[Event] = []
    resume(run, events=events)
    assert [type(event) for event in events] == [AlreadyFinished]


def test_a2_a_best_loss_on_other_rows_is_forgotten_though_the_run_that_changed_them_was_killed(
    halfway: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_json(halfway / "checkpoints" / "step-00000006" / "state.json")["progress"]["best_step"] <= 6
    other = tmp_path / "other.jsonl"
    other.write_text("".join(reversed(chat_file.read_text().splitlines(keepends=True))))
    changed = [f"output={halfway}", f'data.train=[{{"source": "{other}"}}]']
    with pytest.raises(KeyboardInterrupt):
        api.train(api.load_config(halfway / "config.yaml", changed).config, die, resume=True, accept=("data", "fingerprints.data"))
    monkeypatch.setattr("finetune.training.validation._validation_loss", lambda *_: 100.0)
    resume(halfway)
    assert read_json(halfway / "adapter" / "training.json")["best_step"] > 6


def test_a2_a_change_is_named_with_the_option_that_accepts_it(halfway: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resume(halfway, "optimizer.learning_rate=0.02", "tuning.rank=8")
    problems = {problem.what.split()[0]: problem.fix for problem in caught.value.problems}
    assert "--accept 'optimizer.learning_rate'" in problems["optimizer.learning_rate"]
    assert "--accept" not in problems["tuning.rank"]
    with pytest.raises(ConfigError, match="data is as it was"):
        resume(halfway, "optimizer.learning_rate=0.02", accept=("data", "optimizer.learning_rate"))
    resume(halfway, "optimizer.learning_rate=0.02", accept=("optimizer.learning_rate",))
    rates = {row["step"]: max(row["learning_rates"].values()) for row in rows(halfway) if row["kind"] == "step"}
    session = read_json(halfway / "environment.json")["sessions"][-1]
    assert session["changes"] == [{"key": "optimizer.learning_rate", "before": 0.01, "now": 0.02}]
    assert session["from_step"] == 6
    assert rates[7] > rates[6]
    assert result(halfway)


def test_a2_another_base_or_other_data_is_named(
    halfway: Path, make_tiny_model: Callable[..., Path], chat_file: Path, tmp_path: Path
) -> None:
    other, fewer = make_tiny_model(seed=5), tmp_path / "fewer.jsonl"
    fewer.write_text("".join(chat_file.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(ConfigError) as caught:
        resume(halfway, f"model.id={other}", f'data.train=[{{"source": "{fewer}"}}]')
    named = {problem.what.split(" is ")[0] for problem in caught.value.problems}
    assert {"fingerprints.base", "fingerprints.data", "model.id", "data.train"} <= named
    moved = tmp_path / "moved"
    shutil.copytree(api.load_config(halfway / "config.yaml").config.model.id, moved)
    resume(halfway, f"model.id={moved}", accept=("model.id",))
    assert result(halfway)


def test_b4_the_model_is_built_before_the_processes_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir: Path, chat_file: Path
) -> None:
    order: list[str] = []

    def noted(owner: object, name: str) -> Callable[..., Any]:
        real = getattr(owner, name)
        return lambda *rest, **options: (order.append(name), real(*rest, **options))[1]

    for owner, name in ((inputs, "prepare"), (train, "build_model"), (train, "fingerprint"), (train, "Accelerator")):
        monkeypatch.setattr(owner, name, noted(owner, name))
    go(settings(tmp_path / "run", tiny_model_dir, chat_file, train={**TRAIN, "max_steps": 1}))
    assert order[-1] == "Accelerator"
    assert {"prepare", "build_model", "fingerprint"} <= set(order[:-1])
