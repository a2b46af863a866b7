"""What each optimizer keeps from step to step, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from finetune.config.schema import Config, Galore
from finetune.planning.parameters import Parameters

BYTES: Mapping[str, int] = {"bf16": 2, "fp32": 4}
"""Of a scalar, by the name of its type."""
_FP32 = 4
_STATES_BLOCK = 256
"""States of 8 bits that share a constant in fp32."""
_SMALL = 4096
"""Scalars of a tensor below which bitsandbytes keeps states in 32 bits."""


def state_bytes(parameters: Parameters, config: Config, optimizer: str) -> float:
    """What ``optimizer`` (never `auto`) keeps from step to step."""
    scalar = BYTES[config.train.trainable_dtype]
    if optimizer.endswith("-8bit"):
        states = 1 if optimizer == "lion-8bit" else 2
        return states * sum(_eight_bit(tensor.scalars) for tensor in parameters.tensors.values())
    if optimizer == "paged-adamw-32bit":
        return 2 * _FP32 * parameters.trainable
    if optimizer == "lion":
        return scalar * parameters.trainable
    left = {name for group in parameters.groups if group.rule == "adamw" for name in group.names}
    kept: dict[str, Callable[[tuple[int, ...]], int]] = {
        "adafactor": _factored,
        "muon": math.prod,
        "galore": partial(_projected, (config.optimizer.galore or Galore()).rank),
    }
    own = kept.get(optimizer, _two)
    return scalar * sum(2 * tensor.scalars if name in left else own(tensor.shape) for name, tensor in parameters.tensors.items())


def _eight_bit(scalars: int) -> int:
    """Bytes of a state: small tensors keep theirs in 32 bits."""
    return _FP32 * scalars if scalars < _SMALL else scalars + _FP32 * -(-scalars // _STATES_BLOCK)


def _two(sides: tuple[int, ...]) -> int:
    """Both moments of Adam."""
    return 2 * math.prod(sides)


def _factored(sides: tuple[int, ...]) -> int:
    """A row and a column of a matrix (1804.04235)."""
    return math.prod(sides) if len(sides) < 2 else math.prod(sides[:-1]) + sides[-1]


def _projected(rank: int, sides: tuple[int, ...]) -> int:
    """A projector and two moments in its subspace (2403.03507)."""
    short, long = min(sides), max(sides)
    return rank * (short + 2 * long) if len(sides) == 2 and short > rank else 2 * math.prod(sides)
