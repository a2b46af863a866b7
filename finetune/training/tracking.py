"""Metrics to TensorBoard and Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from accelerate.tracking import TensorBoardTracker, WandBTracker

from finetune.config.schema import Tracking
from finetune.errors import HardwareError
from finetune.runs import RunDirectory
from finetune.training.metrics import Evaluated, StepDone


def require_trackers(tracking: Tracking) -> None:
    """HardwareError where a wanted tracker is not installed; called before anything is built."""
    for name in _wanted(tracking):
        if importlib.util.find_spec(name) is None:
            raise HardwareError(
                f"{name} is not installed", where=f"tracking.{name}", fix="pip install 'finetune[tracking]', or set it to false"
            )


def _wanted(tracking: Tracking) -> list[str]:
    return [name for name, on in (("tensorboard", tracking.tensorboard), ("wandb", tracking.wandb)) if on]


@contextmanager
def trackers(tracking: Tracking, run: RunDirectory) -> Iterator[list[Any]]:
    """The wanted trackers, writing below the run directory; closed at the end whatever happens. No setting is sent, only metrics."""
    made: list[Any] = []
    if tracking.tensorboard:
        made.append(TensorBoardTracker("tensorboard", run.path))
    if tracking.wandb:
        made.append(WandBTracker(run.path.name, dir=str(run.path)))
    for tracker in made:
        tracker.start()
    try:
        yield made
    finally:
        for tracker in made:
            tracker.finish()


def scalars(event: StepDone | Evaluated) -> dict[str, float]:
    """The numbers of one row, rates by group."""
    row = asdict(event)
    rates = row.pop("learning_rates", {})
    kind = "train" if isinstance(event, StepDone) else "validation"
    plain = {f"{kind}/{key}": float(value) for key, value in row.items() if key not in ("step", "best")}
    return plain | {f"learning_rate/{name}": rate for name, rate in rates.items()}
