"""Trackers get every row, and nothing but numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import Tracking
from finetune.errors import HardwareError
from finetune.training.metrics import Evaluated, StepDone
from finetune.training.tracking import require_trackers, scalars

STEP = StepDone(3, 0.5, 1.25, 0.1, {"mlp": 0.01, "attention": 0.005}, 100, 60, 2.0, 0.01, 2**30)


def test_rows_become_numbers_by_kind() -> None:
    found = scalars(STEP)
    assert found["train/loss"] == 1.25
    assert found["learning_rate/mlp"] == 0.01
    assert scalars(Evaluated(3, 2.5, 0.1, best=True)) == {"validation/validation_loss": 2.5, "validation/seconds": 0.1}


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(HardwareError, match="wandb is not installed"):
        require_trackers(Tracking(wandb=True))
    require_trackers(Tracking())


def test_tensorboard_files_hold_the_losses(train_here: Callable[..., Any], write_config: Callable[..., Path], tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_here(write_config(tracking={"tensorboard": True}, train={"max_steps": 3, "batch_size": 4, "precision": "fp32"}))
    log = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    assert [point.step for point in log.Scalars("train/loss")] == [1, 2, 3]
