"""How long a run takes and what it draws: from a stated or measured speed, else from its operations and a GPU's rate."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.config.schema import Config, Full
from finetune.planning.gpus import Gpu
from finetune.planning.memory import Setting
from finetune.planning.parameters import Parameters
from finetune.planning.shapes import ModelShape

UTILIZATION = 0.4
"""Share of a GPU's stated rate that training is taken to reach. Assumed, not measured: 0.5 to 0.6 is called good for dense models."""
_LEAST_STEPS = 3
"""Steps below which a run tells nothing of its speed: the first ones compile and allocate."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens of the training examples a second, over all devices."""

    tokens_per_second: float
    origin: Literal["stated", "measured", "estimated"]
    reason: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run takes."""

    seconds: float
    kilowatt_hours: float | None
    """At the most that the boards draw; None where that is not known."""


def stated_speed(tokens_per_second: float) -> Speed:
    """What the user says."""
    return Speed(tokens_per_second, "stated", "--tokens-per-second")


def measured_speed(rows: Iterable[Mapping[str, Any]], where: str) -> Speed | None:
    """The median step of a run, from the rows of its metrics.jsonl, without its first; None where it has too few."""
    steps = [row for row in rows if row.get("kind") == "step" and row.get("seconds")][1:]
    if len(steps) < _LEAST_STEPS:
        return None
    return Speed(statistics.median(row["tokens"] / row["seconds"] for row in steps), "measured", f"the median step of {where}")


def estimated_speed(operations: float, gpu: Gpu, devices: int) -> Speed:
    """From ``operations`` a token (`operations_per_token`)."""
    rate = gpu.tflops * 1e12 * UTILIZATION * devices
    count = f"{devices} x " if devices > 1 else ""
    return Speed(
        rate / operations,
        "estimated",
        f"{operations / 1e9:.1f} GFLOP a token at {UTILIZATION:.0%} of {count}{gpu.name}'s {gpu.tflops:g} TFLOP/s",
    )


def operations_per_token(
    shape: ModelShape, parameters: Parameters, config: Config, setting: Setting, supervised_share: float = 1.0
) -> float:
    """Floating-point operations of a training step by its tokens.

    A product with a weight of n scalars takes 2n forward and 2n for the gradient of its input; 2n more where the weight trains, and 2n more
    where checkpointing computes the forward pass again. The head sees supervised tokens alone, and is not computed again.
    """
    again = 2 if setting.checkpointing else 0
    queries = shape.heads * shape.head_dim
    # queries by keys and probabilities by values, over half of the square: two products forward, four backward
    attention = shape.layers * queries * setting.example_tokens * (6 + again)
    head = 4 * shape.embedding_scalars * supervised_share
    if isinstance(config.tuning, Full):
        return (4 + again) * shape.blocks_scalars + 2 * parameters.trainable + attention + head
    return (4 + again) * shape.blocks_scalars + (6 + again) * parameters.trainable + attention + head


def cost_of(tokens: int, speed: Speed, watts: float | None = None) -> Cost:
    """Of ``tokens`` in all at ``speed``, on devices that draw ``watts`` together."""
    seconds = tokens / speed.tokens_per_second
    return Cost(seconds, None if watts is None else seconds * watts / 3.6e6)
