"""Pitfall C1: no command unpickles anything, wherever somebody put a pickle."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from finetune.cli.app import app
from finetune.errors import FinetuneError

UsageError = typer.BadParameter.__bases__[0]
NAMES = (
    *("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "model.pt"),
    *("rng_state.pth", "consolidated.00.pth", "data.pkl", "model.pkl", "tokenizer.pkl", "rows.pkl", "config.pkl"),
)


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def poison(directory: Path, sentinel: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if name.endswith(".pkl"):
            (directory / name).write_bytes(pickle.dumps(Payload(sentinel)))
        else:
            torch.save(Payload(sentinel), directory / name)


def finetune_here(*arguments: object) -> int:
    """`finetune ARGUMENTS` in this process; its exit code."""
    try:
        return int(app([str(argument) for argument in arguments], standalone_mode=False) or 0)
    except FinetuneError as error:
        return error.exit_code
    except UsageError:
        return 2
    except SystemExit as end:
        return int(end.code or 0)


def test_c1_the_payloads_work(tmp_path: Path) -> None:
    """Were they harmless, the other tests would prove nothing."""
    poison(tmp_path, tmp_path / "ran")
    for load in (
        lambda: torch.load(tmp_path / "model.pt", weights_only=False),
        lambda: pickle.loads((tmp_path / "data.pkl").read_bytes()),
    ):
        load()
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()


def plan_of(runs: list[Path], path: Path) -> Path:
    path.write_text(json.dumps({"method": "linear", "members": [{"run": str(run), "weight": 0.5} for run in runs]}))
    return path


def test_c1_no_command_runs_a_pickle(tmp_path: Path, tiny_model_dir: Path, chat_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    del capfd  # what the commands print
    ran, base, data, run = tmp_path / "ran", tmp_path / "base", tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_model_dir, base)
    data.mkdir()
    shutil.copy(chat_file, data / "chat.jsonl")
    for place in (base, tmp_path):
        poison(place, ran)
    config = tmp_path / "run.yaml"

    def write(source: Path) -> None:
        settings = {
            "model": {"id": str(base)},
            "tuning": {"method": "lora", "rank": 4, "alpha": 8},
            "optimizer": {"learning_rate": 0.01},
            "data": {"train": [{"source": str(source)}], "validation": {"fraction": 0.2}, "max_tokens": 256},
            "train": {
                "epochs": 1,
                "batch_size": 8,
                "precision": "fp32",
                "tokens_per_device": 256,
                "checkpoint": {"every_steps": 1, "keep": 9},
            },
            "evaluation": {"tasks": [{"task": "loss"}], "samples": 0},
            "output": str(run),
        }
        config.write_text(json.dumps(settings))

    def every_command(wanted: int | None, output: str) -> None:
        known: dict[str, list[object]] = {
            "eval": [run],
            "merge": [run, "-O", tmp_path / f"merged {output}"],
            "combine": [plan_of([run, run], tmp_path / "plan.yaml"), "-O", tmp_path / f"combined {output}"],
            "analyze": [run],
            "report": [run],
            "doctor": ["--machine"],
        }
        groups = {"init", "config", "data", "train"}
        for name in [name for name in typer.main.get_command(app).commands if name not in groups]:  # type: ignore[attr-defined]
            code = finetune_here(name, *known.get(name, [run]))
            assert not ran.exists(), name
            assert wanted is None or name not in ("eval", "merge", "analyze") or code == wanted, (name, code)

    for pickled in data.parent.glob("*.pkl"):
        shutil.copy(pickled, data)
    write(data)
    codes = [finetune_here("config", "check", config), finetune_here("data", "preview", config), finetune_here("data", "stats", config)]
    codes.append(finetune_here("train", config))
    assert not ran.exists()
    if run.exists():
        shutil.rmtree(run)
    write(data / "chat.jsonl")
    poison(data, ran)
    assert finetune_here("data", "preview", config) == 0
    assert finetune_here("train", config) == 0
    for place in (run, run / "checkpoints", run / "eval", run / "logs"):
        poison(place, ran)
    assert finetune_here("train", config, "--resume") == 0
    every_command(0, "once")
    assert not ran.exists()

    # beside files that are sealed they are an error, and a checkpoint that holds one is passed over
    steps = sorted((run / "checkpoints").glob("step-*"))
    poison(steps[-1], ran)
    poison(run / "adapter", ran)
    every_command(6, "twice")
    assert finetune_here("train", config, "--resume") == 0
    assert not ran.exists()
    assert not any((run / "adapter" / name).exists() for name in NAMES)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_c1_a_base_that_is_pickled_is_refused(tmp_path: Path, tiny_model_dir: Path, write_config: Callable[..., Path], name: str) -> None:
    base, ran = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(tiny_model_dir, base)
    poison(base, ran)
    for weights in base.glob("*.safetensors"):
        weights.unlink()
    for other in NAMES:
        if other != name:
            (base / other).unlink()
    assert finetune_here("train", write_config(model={"id": str(base)})) == 2
    assert not ran.exists()
