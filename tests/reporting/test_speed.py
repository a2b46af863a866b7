"""How fast an earlier run was, where it computed the same on the same devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.dump import dump_config
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.hardware import Machine
from finetune.reporting.speed import speed_of_run

CPU = Machine("cpu", "a CPU", 2, 2**35, bf16=True)


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path) -> Config:
    """Of a run that lies in its output: a first step of 9 s, then 100, 50 and 80 tokens a second."""
    found = load_config(write_config()).config
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(found))
    (run / "environment.json").write_text(json.dumps({"machine": {"name": CPU.name}, "sessions": [{"devices": 1}]}))
    rows = [{"kind": "step", "step": step, "tokens": 100, "seconds": seconds} for step, seconds in enumerate((9, 1, 2, 1.25), start=1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def test_the_median_step_of_the_same_run(config: Config, tmp_path: Path) -> None:
    speed = speed_of_run(config, CPU, 1)
    assert speed is not None
    assert (speed.tokens_per_second, speed.origin) == (80, "measured")
    assert str(tmp_path / "run") in speed.reason
    longer = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 9})})
    assert speed_of_run(longer, CPU, 1) == speed


def test_another_computation_or_machine_is_not_compared(config: Config, tmp_path: Path) -> None:
    larger = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 99})})
    assert speed_of_run(larger, CPU, 1) is None
    assert speed_of_run(config, CPU, 2) is None
    assert speed_of_run(config, Machine("cuda", "a GPU", 1, 2**35, bf16=True), 1) is None
    assert speed_of_run(config.model_copy(update={"output": str(tmp_path / "nothing")}), CPU, 1) is None


@pytest.mark.parametrize(
    ("name", "text"), [("environment.json", "{"), ("environment.json", "{}"), ("config.yaml", "model: 3"), ("metrics.jsonl", "")]
)
def test_a_damaged_run_tells_nothing(config: Config, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "run" / name).write_text(text)
    assert speed_of_run(config, CPU, 1) is None
