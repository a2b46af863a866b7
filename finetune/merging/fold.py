"""Fold an adapter into its base: shard by shard, tensor by tensor, in fp32, without ever holding the model.

What an adapter does to a weight W0 is in `updates`; a full copy replaces it, and trained rows replace theirs. New tokens get their rows
first, by the rule of `finetune.model.tokens`.

`dequantized` takes for W0 the values that training computed with: every module that was quantized is quantized and dequantized again, with
LoftQ's correction where there is one, and everything else is rounded to the type it was loaded with. That is the model that was evaluated.
`original` takes the weights on disk, and for LoftQ W + s(BA - B0 A0), since the start B0 A0 stands for W - W0. It can be the better model,
but is not the one that was evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.errors import VerificationError
from finetune.merging.adapter import located
from finetune.merging.companions import copy_companions, read_model_config, write_index, write_model_config
from finetune.merging.fitting import require_fitting, settle_tie, unties, with_new_rows
from finetune.merging.inputs import Inputs, MergeSource, open_inputs
from finetune.merging.rounding import Rounding, round_into, rounded
from finetune.merging.updates import LowRankUpdate, Update
from finetune.model.packed import PackedWeights
from finetune.model.quantize import roundtrip
from finetune.model.shards import ShardWriter, Slot
from finetune.model.tokens import enlarged

_BLOCK = 1 << 19
"""Elements that are in fp32 at a time where rows can be merged one by one."""


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What was written."""

    dtype: torch.dtype
    shards: int
    tensors: int
    """Tensors in the output."""
    updated: int
    """Tensors that the adapter changed or replaced."""
    dequantized: int
    """Tensors that were quantized in training and are written as the values training used."""
    untied: bool
    """Whether the output head was tied to the embeddings in the base and is not any more."""
    size: int
    """Bytes of all tensors."""


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor to write: where it is read, and as what it is written."""

    source: str
    slot: Slot


def fold(
    source: MergeSource,
    destination: Path,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
) -> FoldReport:
    """Write the merged model into the empty or missing directory ``destination``, its floating-point tensors in ``dtype``.

    ``rounding`` and ``seed`` say how values between two of the type's own are written (`finetune.merging.rounding`). The output has the
    base's shards, loads with plain transformers, and carries tokenizer and chat template of the adapter directory, or else of the base.
    ``progress`` is called with (tensors done, of). VerificationError where a file is damaged, a tensor of the adapter is not used exactly
    once, a feature is not understood, or a value does not fit ``dtype``; the directory is then incomplete, and `merge` removes it.
    """
    config = read_model_config(source.base_dir)
    with ExitStack() as stack:
        inputs = open_inputs(source, stack)
        adapter, layout = inputs.adapter, inputs.layout
        require_fitting(inputs)
        untied = unties(inputs)
        plan = _plan(inputs, dtype, untied)
        settle_tie(inputs)
        destination.mkdir(parents=True, exist_ok=True)
        total, done = sum(map(len, plan.values())), 0
        for file, outputs in plan.items():
            with ShardWriter(destination / file, {name: output.slot for name, output in outputs.items()}) as writer:
                for name, output in outputs.items():
                    writer.write(name, _written(inputs, name, output, rounding, seed))
                    done += 1
                    if progress:
                        progress(done, total)
        adapter.require_all_taken()
    size = write_index(destination, {file: {name: out.slot for name, out in outputs.items()} for file, outputs in plan.items()})
    rows = next((output.slot.shape[0] for outputs in plan.values() for name, output in outputs.items() if name == layout.embedding), None)
    write_model_config(destination, config, dtype, untied=untied, rows=rows if source.new_ids else None)
    copy_companions(source.base_dir, source.adapter_dir, destination, source.end_ids)
    changed = {name for outputs in plan.values() for name in outputs} & adapter.touched(inputs.weights.info)
    requantized = len(layout.quantized) if source.base == "dequantized" else 0
    return FoldReport(dtype, len(plan), total, len(changed), requantized, untied, size)


def _plan(inputs: Inputs, dtype: torch.dtype, untied: bool) -> dict[str, dict[str, _Output]]:
    """Outputs by file: the base's own, and an output head beside the embedding it was tied to."""
    layout = inputs.layout
    plan: dict[str, dict[str, _Output]] = {file: {} for file in inputs.weights.files}
    for name, info in inputs.weights.info.items():
        slot = Slot(with_new_rows(inputs, name, info.shape), dtype if info.dtype.is_floating_point else info.dtype)
        plan[info.file][name] = _Output(name, slot)
        if untied and name == layout.embedding and layout.head and layout.head not in inputs.weights.info:
            plan[info.file][layout.head] = _Output(name, slot)
    return plan


@torch.no_grad()
def _written(inputs: Inputs, name: str, output: _Output, rounding: Rounding, seed: int) -> Tensor:
    """The tensor ``name`` of the output in its type."""
    module, _, part = name.rpartition(".")
    update = inputs.adapter.updates.get(module) if part == "weight" else None
    # new tokens change rows, be it spare ones, so that not even the shape tells
    enlarges = bool(inputs.source.new_ids) and name in (inputs.layout.embedding, inputs.layout.head)
    whole = module in inputs.layout.quantized or enlarges
    if whole or not isinstance(update, LowRankUpdate) or update.embedding:
        return rounded(_merged(inputs, name, output.source), output.slot.dtype, name, rounding, seed)
    result = torch.empty(output.slot.shape, dtype=output.slot.dtype)
    for start, values in _by_rows(inputs, name, output, update):
        place = result[start : start + len(values)]
        round_into(place.view(-1), values.view(-1), start * values.shape[1], name, rounding, seed)
    return result


def _by_rows(inputs: Inputs, name: str, output: _Output, update: LowRankUpdate) -> Iterator[tuple[int, Tensor]]:
    """(first row, values) of a low-rank update of a weight that was not quantized, a few rows at a time: what is in fp32 then stays in the
    processor's cache, and the allocator asks the system for no new pages."""
    source = inputs.source
    stored = inputs.weights.read(output.source)
    taken = {key: inputs.adapter.take(key, name).to(source.device) for key in update.keys}
    rows, width = stored.shape
    with located(str(source.adapter_dir)):
        update.require_rows(rows, taken)
    at_once = max(1, _BLOCK // width)
    for start in range(0, rows, at_once):
        block = stored[start : start + at_once].to(source.device)
        values = (block if source.base == "original" else block.to(source.compute_dtype)).to(torch.float32, copy=True)
        part = update.rows(taken, start, len(values))
        yield start, update.on_weight(values, part.__getitem__, lambda found: found)


@torch.no_grad()
def _merged(inputs: Inputs, name: str, source: str) -> Tensor:
    """The tensor ``name`` of the output: ``source`` of the base with what the adapter does to it."""
    adapter, layout = inputs.adapter, inputs.layout
    if name in adapter.copies:
        return adapter.take(adapter.copies[name], name)
    stored = inputs.weights.read(source)
    module, _, part = name.rpartition(".")
    touched = adapter.touches(name)
    enlarges = bool(inputs.source.new_ids) and name in (layout.embedding, layout.head)
    quantized = part == "weight" and module in layout.quantized
    if not stored.is_floating_point() or not (touched or enlarges or quantized):
        return stored.to(inputs.source.compute_dtype) if stored.is_floating_point() and inputs.source.base == "dequantized" else stored
    values = base_values(inputs, name, stored, quantized=quantized)
    if name in adapter.rows:
        return _with_rows(inputs, name, values)
    return _updated(inputs, name, values, adapter.updates[module]) if touched else values


def base_values(inputs: Inputs, name: str, stored: Tensor, *, quantized: bool) -> Tensor:
    """W0 of ``name``, which is ``stored``: fp32 on the device, what training computed with or the original, with the rows of new tokens."""
    source, corrections = inputs.source, inputs.corrections
    module = name.removesuffix(".weight")
    stored = stored.to(source.device)
    if not quantized or source.base == "original":
        loaded = stored if source.base == "original" else stored.to(source.compute_dtype)
        if name in (inputs.layout.embedding, inputs.layout.head):
            loaded = enlarged(loaded, source.new_ids)
        return loaded.to(torch.float32, copy=True)
    if corrections is not None and module in corrections.modules:
        base = corrections.read(module).base
        stored = base.added_to(stored, -1.0) if base is not None else stored
    if isinstance(inputs.weights, PackedWeights):
        return stored.float()  # as it was stored quantized: a second time would change it
    return roundtrip(stored, source.quantization, source.compute_dtype, source.device)


def _with_rows(inputs: Inputs, name: str, values: Tensor) -> Tensor:
    """``values`` (vocabulary, d) with the adapter's rows in place of its own, rounded as the adapter model rounds them."""
    source, rows = inputs.source, inputs.adapter.rows[name]
    if max(rows.ids) >= len(values):
        raise VerificationError(
            f"the adapter has a row {max(rows.ids)} for {name}, which has {len(values)}",
            where=str(source.adapter_dir),
            fix="merge with the run's own config, whose model.new_tokens enlarge the vocabulary",
        )
    trained = inputs.adapter.take(rows.key, name).to(values.device)
    values[list(rows.ids)] = trained.to(source.compute_dtype).float() if source.base == "dequantized" else trained
    return values


def _updated(inputs: Inputs, name: str, values: Tensor, update: Update) -> Tensor:
    """``values`` with the adapter's update: a weight (d_out, d_in), or a bias (d_out,) that is scaled with its outputs."""
    module, _, part = name.rpartition(".")

    def take(key: str) -> Tensor:
        return inputs.adapter.take(key, name).to(values.device)

    def corrected(found: Tensor) -> Tensor:
        corrections = inputs.corrections
        if inputs.source.base == "original" and corrections is not None and module in corrections.modules:
            return corrections.read(module).start.added_to(found, -1.0)
        return found

    with located(str(inputs.source.adapter_dir)):
        if part == "bias":
            return update.on_weight(values[:, None], take, lambda found: found)[:, 0]
        return update.on_weight(values, take, corrected)
