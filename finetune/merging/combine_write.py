"""A combination on disk: as a whole model, tensor by tensor, or as a plain LoRA of one rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.errors import ConfigError
from finetune.merging.adapter import WEIGHTS
from finetune.merging.combine_deltas import Combination, Progress, Updates
from finetune.merging.companions import copy_companions, copy_tokenizer, read_model_config, write_index, write_model_config
from finetune.merging.plain_adapter import targets_of
from finetune.merging.rounding import rounded
from finetune.merging.updates import LowRankUpdate
from finetune.model.low_rank import low_rank
from finetune.model.shards import ShardWriter

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The model that was written."""

    files: int
    tensors: int
    updated: int
    """Tensors that at least one adapter changed."""
    untied: bool
    """Whether the head was tied to the embeddings in the base and is not any more."""
    size: int
    """Bytes of all tensors."""


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """The adapter that was written."""

    rank: int
    modules: int
    error: float
    """||delta - BA|| / ||delta|| over all modules together."""
    errors: dict[str, float]
    """The same by type of module."""
    padded: int
    """Modules whose smaller side is below the rank: the rest of their factors is zero."""
    size: int
    """Bytes of all tensors."""


@torch.no_grad()
def write_model(combination: Combination, destination: Path, dtype: torch.dtype, tokenizer_dir: Path, advance: Progress) -> ModelReport:
    """Write the combined model into the empty directory ``destination``, its floating-point tensors in ``dtype``.

    VerificationError: a file is damaged, a tensor of an adapter finds no place. DoesNotFitError: a value is beyond the range of ``dtype``.
    """
    updates = combination.updates
    source, layout = updates.inputs[0].source, updates.inputs[0].layout
    touched, shards = updates.touched(), updates.slots(dtype)
    for file, slots in shards.items():
        with ShardWriter(destination / file, slots) as writer:
            for name, slot in slots.items():
                writer.write(name, rounded(combination.weight(name, touched=name in touched), slot.dtype, name))
                advance("tensors", 1)
    updates.require_all_used()
    size = write_index(destination, shards)
    rows = next((slots[layout.embedding].shape[0] for slots in shards.values() if layout.embedding in slots), None)
    config = read_model_config(source.base_dir)
    write_model_config(destination, config, dtype, untied=updates.untied, rows=rows if source.new_ids else None)
    copy_companions(source.base_dir, tokenizer_dir, destination, source.end_ids)
    return ModelReport(len(shards), sum(map(len, shards.values())), len(touched), updates.untied, size)


def require_low_rank(updates: Updates, rank: int) -> None:
    """ConfigError for what no LoRA of ``rank`` on the base can hold, with what to do instead."""
    source = updates.inputs[0].source
    what, fix = "", "write a model instead: `output: {kind: model}`"
    if source.new_ids:
        what = "the runs added tokens, whose rows no LoRA holds"
    elif source.loftq and source.base == "dequantized":
        what = "LoftQ adapters belong to the quantized base together with what their start took from it"
        fix = "`base: {weights: original}` makes an adapter of the unquantized base; or write a model: `output: {kind: model}`"
    else:
        whole = sorted(name for name in updates.touched() if not _is_linear(updates, name))
        what = f"{whole[0]} is not a product of factors: {len(whole)} weights changed as a whole" if whole else ""
    if what:
        raise ConfigError(f"this combination cannot be an adapter: {what}", where="output.kind", fix=fix)
    largest = max(min(_shape(updates, name)) for name in updates.touched())
    if rank > largest:
        raise ConfigError(
            f"rank {rank} is more than any combined weight can have: the largest has {largest}",
            where="output.rank",
            fix=f"at rank {largest} nothing is lost",
        )


def _is_linear(updates: Updates, name: str) -> bool:
    """Whether every adapter that touches ``name`` has factors or scales of that very weight, and a LoRA can hold their sum."""
    embedding = updates.inputs[0].layout.embedding
    for inputs in (each for place, each in enumerate(updates.inputs) if updates.touches(place, name)):
        update = inputs.adapter.updates.get(name.removesuffix(".weight"))
        if update is None or not name.endswith(".weight") or name in inputs.adapter.copies or name in inputs.adapter.rows:
            return False
        if (name == embedding) != (isinstance(update, LowRankUpdate) and update.embedding):
            return False
    return len(_shape(updates, name)) == 2


def _shape(updates: Updates, name: str) -> tuple[int, ...]:
    return next(slots[name].shape for slots in updates.slots(torch.float32).values() if name in slots)


@torch.no_grad()
def write_adapter(combination: Combination, destination: Path, rank: int, base_name: str, advance: Progress) -> AdapterReport:
    """Write the best approximation of ``rank`` as a LoRA with alpha = r into the directory ``destination``; see `require_low_rank`."""
    updates = combination.updates
    embedding = updates.inputs[0].layout.embedding
    tensors: dict[str, Tensor] = {}
    lost: defaultdict[str, float] = defaultdict(float)
    whole: defaultdict[str, float] = defaultdict(float)
    names = sorted(updates.touched())
    narrow = 0
    for name in names:
        delta = combination.update(name)
        delta = delta.T if name == embedding else delta
        b, a = low_rank(delta, rank)
        module = name.removesuffix(".weight")
        kind = module.rpartition(".")[2]
        lost[kind] += float((delta - b @ a).double().square().sum())
        whole[kind] += float(delta.double().square().sum())
        narrow += min(delta.shape) < rank
        ends = (".lora_embedding_A", ".lora_embedding_B") if name == embedding else (".lora_A.weight", ".lora_B.weight")
        tensors |= {f"{_PREFIX}{module}{ends[0]}": a.cpu().contiguous(), f"{_PREFIX}{module}{ends[1]}": b.cpu().contiguous()}
        advance("singular values", 1)
    updates.require_all_used()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets_of({name.removesuffix(".weight") for name in names}, set(updates.inputs[0].weights.info)),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    config.save_pretrained(str(destination))
    save_file(tensors, destination / WEIGHTS, {"format": "pt"})
    errors = {kind: _relative(lost[kind], whole[kind]) for kind in sorted(whole)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    return AdapterReport(rank, len(names), _relative(sum(lost.values()), sum(whole.values())), errors, narrow, size)


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0


def copy_adapter_companions(combination: Combination, tokenizer_dir: Path, destination: Path) -> None:
    """Tokenizer and chat template beside an adapter."""
    copy_tokenizer(combination.updates.inputs[0].source.base_dir, tokenizer_dir, destination)


def factors_in(directory: Path, combination: Combination) -> Mapping[str, tuple[Tensor, Tensor, bool]]:
    """(B, A, whether of an embedding) by the name of the weight, as the adapter's file holds them."""
    stored = load_file(directory / WEIGHTS)
    embedding = combination.updates.inputs[0].layout.embedding
    found = {}
    for name in combination.updates.touched():
        key = f"{_PREFIX}{name.removesuffix('.weight')}"
        is_embedding = name == embedding
        ends = (".lora_embedding_B", ".lora_embedding_A") if is_embedding else (".lora_B.weight", ".lora_A.weight")
        found[name] = (stored[key + ends[0]], stored[key + ends[1]], is_embedding)
    return found
