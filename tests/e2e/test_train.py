"""Training as a user does it: run directory, resume, signals, several processes, errors."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import api
from finetune.errors import ConfigError, FinetuneError, RunInterruptedError
from finetune.sealed import verify
from finetune.training.metrics import Event, StepDone

Run = Callable[..., Any]
Write = Callable[..., Path]


def adapter_hash(run: Path) -> str:
    return str(json.loads((run / "adapter" / "MANIFEST.json").read_text())["sha256"]["adapter_model.safetensors"])


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


DROPOUT = {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.2, "scaling": "rslora"}
TRAIN = {"epochs": 3, "batch_size": 4, "precision": "fp32", "tokens_per_device": 128, "checkpoint": {"every_steps": 2}}


def test_a_run_leaves_what_the_contract_says(finetune: Run, write_config: Write, tmp_path: Path) -> None:
    done = finetune("train", write_config())
    assert done.code == 0, done.err
    run = tmp_path / "run"
    assert done.out == f"{run}\n"
    assert {"config.yaml", "environment.json", "plan.json", "metrics.jsonl", "report.html", "checkpoints", "adapter"} <= {
        path.name for path in run.iterdir()
    }
    assert not [path for path in run.rglob("*") if ".tmp" in path.name]
    assert {path.suffix for path in run.rglob("*")} & {".bin", ".pt", ".pth", ".pkl"} == set()
    rows = metrics(run)
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["loss"] < steps[0]["loss"]
    again = finetune("config", "check", run / "config.yaml")
    assert again.code == 0, again.err


@pytest.mark.parametrize("optimizer", ["adamw", "paged-adamw-8bit"])
def test_d1_killed_and_resumed_equals_uninterrupted(train_here: Run, write_config: Write, tmp_path: Path, optimizer: str) -> None:
    settings = {"tuning": DROPOUT, "train": TRAIN, "optimizer": {"learning_rate": 0.01, "method": optimizer}}
    train_here(write_config("a.yaml", **settings, output=str(tmp_path / "straight")))
    config = write_config("b.yaml", **settings, output=str(tmp_path / "killed"))
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "finetune", "train", str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: any(path.name >= "step-00000004" for path in killed.glob("checkpoints/step-*")), process)
    process.kill()
    process.communicate()
    assert not (killed / "adapter").exists()
    train_here(config, resume=True)
    assert adapter_hash(killed) == adapter_hash(tmp_path / "straight")
    wanted, got = metrics(tmp_path / "straight"), metrics(killed)
    assert [(row["kind"], row["step"], row.get("loss")) for row in got] == [(row["kind"], row["step"], row.get("loss")) for row in wanted]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_b2_a_signal_saves_and_says_how_to_resume(write_config: Write, tmp_path: Path, number: int, code: int) -> None:
    config = write_config(train={**TRAIN, "epochs": 400, "checkpoint": {"every_steps": 1000}})
    process = subprocess.Popen([sys.executable, "-m", "finetune", "train", str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path / "run")) > 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err.decode()
    assert out == b""
    assert b"--resume" in err
    assert b"Traceback" not in err
    assert not (tmp_path / "run" / "adapter").exists()
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert (newest / "MANIFEST.json").exists()
    assert metrics(tmp_path / "run")[-1]["step"] == int(newest.name.removeprefix("step-"))


def test_two_processes_train_the_same_model(finetune: Run, train_here: Run, write_config: Write, tmp_path: Path) -> None:
    train_here(write_config("a.yaml", output=str(tmp_path / "one")))
    two = finetune("train", write_config("b.yaml", output=str(tmp_path / "two")), "--devices", "2")
    assert two.code == 0, two.err
    assert two.out == f"{tmp_path / 'two'}\n"
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for key in ("loss", "grad_norm", "learning_rates", "validation_loss"):
        wanted, got = ([row[key] for row in rows if key in row] for rows in (a, b))
        assert got == [pytest.approx(value, rel=1e-5) for value in wanted], key


def test_a13_the_seed_reaches_everything(train_here: Run, write_config: Write, tmp_path: Path) -> None:
    hashes = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        settings = {"tuning": DROPOUT, "seed": seed, "train": {**TRAIN, "max_steps": 3}}
        hashes.append(adapter_hash(train_here(write_config(**settings, output=str(tmp_path / name)))))
    assert hashes[0] == hashes[1] != hashes[2]


def test_b11_an_occupied_output_is_refused_and_a_finished_run_is_left_alone(train_here: Run, write_config: Write, tmp_path: Path) -> None:
    config = write_config(train={**TRAIN, "max_steps": 2})
    train_here(config)
    with pytest.raises(ConfigError, match="--resume"):
        train_here(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "adapter").iterdir()}
    train_here(config, resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "adapter").iterdir()}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.learning_rate=0.02", "optimizer.learning_rate"),
        ("seed=3", "seed"),
        ("tuning.rank=8", "tuning.rank"),
        ("data.max_tokens=128", "data.max_tokens"),
    ],
)
def test_a2_resume_names_every_difference(interrupted: tuple[Path, Path], train_here: Run, override: str, named: str) -> None:
    config, run = interrupted
    with pytest.raises(ConfigError) as caught:
        train_here(config, override, resume=True)
    assert any(problem.what.startswith(f"{named} is ") for problem in caught.value.problems)
    assert not (run / "adapter").exists()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, chat_file: Path) -> tuple[Path, Path]:
    """A run that was stopped by a signal: (config, run directory)."""
    folder = tmp_path_factory.mktemp("interrupted")
    config, run = folder / "run.yaml", folder / "run"
    settings = {
        "model": {"id": str(tiny_model_dir)},
        "tuning": DROPOUT,
        "data": {"train": [{"source": str(chat_file)}], "max_tokens": 256},
        "train": {**TRAIN, "epochs": 500},
        "output": str(run),
    }
    config.write_text(json.dumps(settings))

    def stop_after_three(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(RunInterruptedError):
        api.train(api.load_config(config).config, stop_after_three)
    return config, run


def test_a2_resume_refuses_changed_data(interrupted: tuple[Path, Path], finetune: Run, chat_file: Path) -> None:
    config, _ = interrupted
    text = chat_file.read_text()
    chat_file.write_text(text.replace("Title 3", "Title 4"))
    try:
        done = finetune("train", config, "--resume")
    finally:
        chat_file.write_text(text)
    assert done.code == 2
    assert "fingerprints.data" in done.err


BAD = {
    "wrong key": ({"trian": {}}, 2, "trian"),
    "missing data file": ({"data": {"train": [{"source": "/nowhere/chat.jsonl"}]}}, 3, "/nowhere/chat.jsonl"),
    "unknown target": ({"tuning": {"method": "lora", "targets": ["q_porj"]}}, 2, "did you mean 'q_proj'"),
    "missing model": ({"model": {"id": "/nowhere/model"}}, 2, "/nowhere/model"),
    "unmatched group": ({"optimizer": {"groups": {"layers[.]77[.]": {"lr_ratio": 2.0}}}}, 2, "layers[.]77[.]"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_have_three_parts_and_leave_nothing(train_here: Run, write_config: Write, tmp_path: Path, case: str) -> None:
    sections, code, named = BAD[case]
    with pytest.raises(FinetuneError) as caught:
        train_here(write_config(**sections))
    assert caught.value.exit_code == code
    problem = caught.value.problems[0]
    assert named in str(problem)
    assert problem.where
    assert problem.fix
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "tuning",
    [
        {"method": "full"},
        {"method": "lora", "rank": 4, "dora": True},
        {"method": "lora", "rank": 4, "embeddings": "lora"},
        {"method": "lora", "rank": 4, "embeddings": "full"},
    ],
    ids=lambda tuning: "-".join(str(value) for value in tuning.values()),
)
def test_what_is_evaluated_is_what_was_trained(train_here: Run, write_config: Write, tuning: dict[str, Any]) -> None:
    """In bf16, where copies in the wrong type show: the last validation of the run and `eval` agree to the last digits."""
    settings = {"epochs": 2, "batch_size": 8, "precision": "bf16", "tokens_per_device": 256}
    run = train_here(write_config(tuning=tuning, train=settings))
    last = [row["validation_loss"] for row in metrics(run) if row["kind"] == "evaluation"][-1]
    figures = api.evaluate(run).figures
    loss = next(figure.values for figure in figures if figure.name == "validation: loss")
    assert loss["tuned"] == pytest.approx(last, abs=1e-6)
    assert (
        json.loads((run / ("model" if tuning["method"] == "full" else "adapter") / "training.json").read_text())["validation_loss"] == last
    )


def test_a_damaged_result_is_written_again_on_resume(train_here: Run, write_config: Write, tmp_path: Path) -> None:
    config = write_config(train={**TRAIN, "max_steps": 2})
    train_here(config)
    wanted = adapter_hash(tmp_path / "run")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "run" / "checkpoints" / ".step-00000009.77.tmp").mkdir()
    train_here(config, resume=True)
    assert adapter_hash(tmp_path / "run") == wanted
    verify(tmp_path / "run" / "adapter")
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_an_output_below_a_file_is_refused_at_once(train_here: Run, write_config: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not a directory"):
        train_here(write_config(output=str(tmp_path / "file" / "run")))


def test_a_model_that_is_named_without_its_dot_is_found_from_elsewhere(
    finetune: Run, write_config: Write, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model, run, elsewhere = tmp_path / "tiny", tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(tiny_model_dir, model)
    elsewhere.mkdir()
    config = write_config(model={"id": "tiny"}, train={"max_steps": 1, "precision": "fp32"})
    done = finetune("train", config, cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    for command in (["eval", run, "-o", "evaluation.tasks=[{task: loss}]"], ["merge", run, "-O", "merged"]):
        done = finetune(*command, cwd=elsewhere)
        assert done.code == 0, done.err
    assert (elsewhere / "merged" / "config.json").is_file()


def test_a_malformed_line_is_named(finetune: Run, write_config: Write, tmp_path: Path) -> None:
    data = tmp_path / "broken.jsonl"
    data.write_text('{"question": "a", "answer": "b"}\n{"question": "a", "answer": \n')
    done = finetune("train", write_config(data={"train": [{"source": str(data)}]}))
    assert done.code == 3
    assert "broken.jsonl:2" in done.err
    assert "where:" in done.err
    assert "fix:" in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["eval", "--help"], ["merge", "--help"]], ids=" ".join)
def test_help_loads_little(arguments: list[str]) -> None:
    """What makes it quick, counted: seconds are `make bench-startup`'s, since a busy machine would fail them."""
    code = (
        "import sys\nfrom finetune.cli.app import main\n"
        f"sys.argv = ['finetune', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'peft', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 450, len(sys.modules)\n"  # 330 to 420 with rich, which draws the help
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert "Usage" in done.stdout
