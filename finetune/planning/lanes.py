"""How many micro-batches the cores of a CPU compute side by side, and what each costs besides (`finetune.training.lanes`, `.forks`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.config.schema import Config, EightBit, Lora
from finetune.planning.activations import CAPPED, Arithmetic
from finetune.planning.parameters import Parameters
from finetune.planning.shapes import ModelShape

if TYPE_CHECKING:
    from finetune.planning.memory import Setting

LARGEST_SHARE = 0.1
"""Of a model's parameters that train, beyond which there is one lane: each holds their gradient."""
FORK = 80 * 2**20
"""Bytes that each process that computes a lane beside another has of its own besides: pages of the interpreter that it wrote to, 56 to 76
MiB measured after some steps, and kernels that oneDNN compiled for it."""


def count_lanes(shape: ModelShape, parameters: Parameters, config: Config, setting: Setting, how: Arithmetic) -> int:
    """How many there are where every micro-batch is full: at least one, at most one a core."""
    if setting.kind != "cpu" or setting.world > 1 or not how.packed or setting.checkpointing or how.dropout:
        return 1
    if shape.family in CAPPED or parameters.trainable > LARGEST_SHARE * parameters.total or _rewrites_weights(config):
        return 1
    return max(1, min(setting.threads, setting.tokens // setting.example_tokens))


def _rewrites_weights(config: Config) -> bool:
    return isinstance(config.tuning, Lora) and config.tuning.dora and isinstance(config.quantization, EightBit)
