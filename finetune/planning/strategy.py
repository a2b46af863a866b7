"""How several devices share a model: decided from its size, their number and their memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.distributed_checks import unspreadable
from finetune.config.schema import Config, FourBit
from finetune.errors import ConfigError
from finetune.hardware import Machine

_SHARE_FOR_WEIGHTS = 0.6
"""Of a device's memory; the rest is for activations, the adapter with its optimizer, and what the allocator cannot use."""

_OF_A_BLOCK = re.compile(r"[.]\d+[.]")
_SCALES_BITS = {True: 0.127, False: 0.5}
"""Bits a parameter that the block constants of a 4-bit weight take, with and without double quantization (2305.14314, section 3)."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Scalars of a model, by what becomes of them."""

    matrices: int
    """In the matrices of its blocks: the part that is quantized."""
    others: int
    """Embeddings, output head, norms, biases."""

    def bytes(self, config: Config, compute_bytes: int) -> int:
        """Memory of the frozen base as `quantization` stores it; ``compute_bytes`` is the size of an unquantized scalar."""
        match config.quantization:
            case FourBit(double_quant=double):
                each = (4 + _SCALES_BITS[double]) / 8
            case base:
                each = 1.0 if base.method == "int8" else float(compute_bytes)
        return math.ceil(self.matrices * each + self.others * compute_bytes)


@dataclass(frozen=True, slots=True)
class Crowd:
    """The processes that train together, and what they share."""

    weights: Weights = Weights(0, 0)
    world: int = 1
    """All of them."""
    on_this_machine: int = 1


def read_weights(directory: Path) -> Weights:
    """Counted in the headers of the safetensors files of ``directory``, without loading a tensor."""
    matrices = others = 0
    for name, shape in _shapes(directory):
        if _OF_A_BLOCK.search(name) and len(shape) == 2:
            matrices += math.prod(shape)
        else:
            others += math.prod(shape)
    return Weights(matrices, others)


def _shapes(directory: Path) -> Iterator[tuple[str, list[int]]]:
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
        yield from ((name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def choose_strategy(config: Config, machine: Machine, compute_bytes: int, crowd: Crowd) -> tuple[str, str]:
    """`ddp` or `fsdp` and the sentence that says why; ``compute_bytes`` is the size of an unquantized scalar of the base.

    ConfigError for offloading where there is no GPU.
    """
    if crowd.world == 1:
        return "ddp", "one device: there is nothing to share"
    if config.distributed.offload and machine.kind == "cpu":
        raise ConfigError(
            "`distributed.offload` keeps weights out of GPU memory, and there is no GPU here", where="distributed.offload", fix="remove it"
        )
    if config.distributed.strategy != "auto":
        return config.distributed.strategy, "stated in distributed.strategy"
    if obstacle := unspreadable(config):
        return "ddp", f"every device holds the model; it cannot be spread, since {obstacle[0]}"
    # processes on a CPU share one memory, each GPU has its own
    copies = crowd.on_this_machine if machine.kind == "cpu" else 1
    size = f"{crowd.weights.bytes(config, compute_bytes) * copies / 2**30:.1f} GiB of weights"
    have = f"{_SHARE_FOR_WEIGHTS:.0%} of {machine.memory_bytes / 2**30:.0f} GiB"
    each = f"for {copies} processes" if copies > 1 else "a device"
    if crowd.weights.bytes(config, compute_bytes) * copies > _SHARE_FOR_WEIGHTS * machine.memory_bytes:
        return "fsdp", f"{size} {each} are more than {have}: they are spread over {crowd.world} devices"
    return "ddp", f"{size} {each} fit in {have}, so that every device can hold the model"
