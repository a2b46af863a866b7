"""Host memory of a run on a GPU whose hidden states wait there (`train.gradient_checkpointing: offload`)."""

from __future__ import annotations

from finetune.planning.shapes import ModelShape


def host_bytes(shape: ModelShape, tokens: int, scalar: int) -> int:
    """What a micro-batch of ``tokens`` leaves in host memory: the input of every block, in scalars of ``scalar`` bytes."""
    return shape.layers * pinned_bytes(tokens * shape.hidden * scalar)


def pinned_bytes(size: int) -> int:
    """Host memory that torch pins for a tensor of ``size`` bytes: the next power of two, so that it can be used again."""
    return 1 << max(0, size - 1).bit_length()
