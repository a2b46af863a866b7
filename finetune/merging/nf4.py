"""A merged model quantized again to NF4: a directory that plain `AutoModelForCausalLM.from_pretrained` loads as a 4-bit model.

The layout is the one that transformers writes for bitsandbytes: for each quantized module its packed bytes, `weight` (d_out * d_in / 2, 1)
uint8, and beside it the constants of its blocks, `weight.absmax`, `weight.quant_map`, with double quantization `weight.nested_absmax` and
`weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4`, JSON as bytes. Everything else stays in the type of computation.

Source: QLoRA (2305.14314, section 3).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from finetune.config.schema import FourBit
from finetune.errors import VerificationError
from finetune.merging.companions import write_index
from finetune.model.quantize import bnb_config, quantize_weight
from finetune.model.shards import ShardWriter, Slot
from finetune.model.weights import SINGLE, Weights

SHARD_BYTES = 1 << 30
"""An output shard is held in memory until it is this large: how long the JSON beside a weight is shows only once it is quantized."""


def quantize_directory(
    merged: Path, destination: Path, quantized: frozenset[str], quantization: FourBit, dtype: torch.dtype, device: str = "cpu"
) -> int:
    """Write the model in ``merged`` into ``destination`` with the modules ``quantized`` in 4 bits and the rest in ``dtype``.

    config.json gets its `quantization_config`; the other files of ``merged`` are not copied. Peak memory is `SHARD_BYTES` and one weight.
    Returns the bytes of all tensors. VerificationError where ``merged`` lacks a module that is to be quantized.
    """
    shards: list[dict[str, Slot]] = []
    pending: dict[str, Tensor] = {}
    with Weights.of_model(merged) as weights:
        lost = sorted(module for module in quantized if f"{module}.weight" not in weights.info)
        if lost:
            raise VerificationError(f"{lost[0]} is to be quantized and not in the merged model", where=str(merged))
        for name in weights.info:
            for part, tensor in _parts(weights.read(name), name, quantized, quantization, dtype, device):
                pending[part] = tensor
            if sum(tensor.nbytes for tensor in pending.values()) >= SHARD_BYTES:
                shards.append(_flush(destination, len(shards), pending))
    if pending:
        shards.append(_flush(destination, len(shards), pending))
    size = write_index(destination, _named(destination, shards))
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    settings = bnb_config(quantization, dtype)
    written = config | {"dtype": str(dtype).removeprefix("torch."), "quantization_config": settings.to_dict() if settings else None}
    (destination / "config.json").write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return size


@torch.no_grad()
def _parts(
    tensor: Tensor, name: str, quantized: frozenset[str], quantization: FourBit, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Tensor]]:
    """What is stored for the tensor ``name``: itself, or a packed weight and the constants of its blocks."""
    module, _, part = name.rpartition(".")
    if part != "weight" or module not in quantized:
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
        return
    parameter = quantize_weight(tensor, quantization, dtype, device).parameter
    yield name, parameter.data.cpu()
    state = parameter.quant_state  # type: ignore[attr-defined]  # a Params4bit
    for key, value in state.as_dict(packed=True).items():
        yield f"{name}.{key}", value.cpu()


def _flush(destination: Path, number: int, pending: dict[str, Tensor]) -> dict[str, Slot]:
    """Write ``pending`` as one shard and empty it."""
    slots = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor in pending.items()}
    with ShardWriter(destination / f"shard-{number}.safetensors", slots) as writer:
        for name, tensor in pending.items():
            writer.write(name, tensor)
    pending.clear()
    return slots


def _named(destination: Path, shards: list[dict[str, Slot]]) -> dict[str, dict[str, Slot]]:
    """The shards under the names that transformers gives them, which hold their number."""
    names = (
        [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)] if len(shards) > 1 else [SINGLE]
    )
    for number, name in enumerate(names):
        (destination / f"shard-{number}.safetensors").rename(destination / name)
    return dict(zip(names, shards, strict=True))
