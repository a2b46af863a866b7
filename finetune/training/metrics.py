"""What a run tells while it trains: metrics.jsonl for tomorrow, events for whoever watches now."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.planning.plan import Plan
from finetune.planning.steps import Steps
from finetune.runs import RunDirectory
from finetune.sealed import write_text, writing


@dataclass(frozen=True, slots=True)
class Planned:
    """What the run will be, told before data is read or a weight is loaded."""

    plan: Plan | None
    reason: str
    """Why there is no plan; empty where there is one."""


@dataclass(frozen=True, slots=True)
class Preparing:
    """Data is read, rendered and compared; nothing comes where the cache has it all."""

    stage: str
    done: int
    of: int
    """0 where the end is not known."""


@dataclass(frozen=True, slots=True)
class Started:
    """Everything is built; step ``done`` + 1 is next."""

    steps: Steps
    done: int
    trainable: int
    """Trainable scalars."""
    total: int
    """All scalars, quantized ones counted unpacked."""
    groups: tuple[dict[str, Any], ...]
    counts: dict[str, int]
    choices: dict[str, tuple[str, str]]
    """Each "auto": what was chosen and why."""
    notes: tuple[str, ...]
    device: str
    device_bytes: int
    """Memory of the device that each process computes on; of the host for a CPU."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step."""

    step: int
    """1-based."""
    epoch: float
    loss: float
    """Nats a supervised token over the global batch."""
    grad_norm: float
    """Before clipping."""
    learning_rates: dict[str, float]
    tokens: int
    """Tokens of the global batch, padding not counted."""
    supervised_tokens: int
    seconds: float
    input_seconds: float
    """Of ``seconds``, what the device waited for rows: reading them and laying them out as tensors."""
    memory_bytes: int
    """The most so far of this process and its forks: resident memory on a CPU, allocated memory of its device on a GPU."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Validation loss after a step."""

    step: int
    validation_loss: float
    seconds: float
    best: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of the model as it was after a step."""

    prompt: str
    text: str
    """As the model wrote it, nothing escaped."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Answers to the same prompts as every time, so that they can be compared over the steps."""

    step: int
    samples: tuple[Sample, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A sealed checkpoint."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class CheckpointDamaged:
    """A checkpoint that is not what was saved: the run goes on from an older one."""

    path: Path
    reason: str
    aside: Path
    """Where it lies now."""


@dataclass(frozen=True, slots=True)
class TrackerLost:
    """A service that no longer takes figures; the run goes on without it, and metrics.jsonl has them all."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class AlreadyFinished:
    """The run that was to be resumed has nothing left to do."""

    path: Path


Row = StepDone | Evaluated | Sampled
"""What is kept in metrics.jsonl."""
KINDS: dict[type[Row], str] = {StepDone: "step", Evaluated: "evaluation", Sampled: "sample"}
"""``kind`` of each row."""

Event = AlreadyFinished | Planned | Preparing | Started | Row | CheckpointSaved | CheckpointDamaged | TrackerLost
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The observer that nobody watches."""
    del event


class MetricsFile:
    """metrics.jsonl: one JSON object a line, appended as it happens.

    ``kind`` says which of `StepDone`, `Evaluated` and `Sampled` a row is; its other keys are the fields. Rows of older runs lack what came
    later (``input_seconds``, ``memory_bytes``).
    """

    def __init__(self, run: RunDirectory, from_step: int, *, evaluation_due: bool = False) -> None:
        """Continue after ``from_step``; rows beyond it were written by steps that a kill undid, and are dropped.

        ``evaluation_due``: the evaluation of that step is still to come, or to be done again.
        """
        self._path = run.metrics
        kept = [row for row in run.metric_rows() if row.get("step", 0) <= from_step]
        rows = [row for row in kept if not (evaluation_due and row.get("step") == from_step and row.get("kind") == "evaluation")]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, event: Row) -> None:
        """Write one row; a single write call, so that a kill cuts at most the last line."""
        row = {"kind": KINDS[type(event)], **asdict(event)}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with writing(self._path):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if os.write(descriptor, line) != len(line):  # what a full disk took of it is dropped when the run is resumed
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
