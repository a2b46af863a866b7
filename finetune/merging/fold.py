"""Fold an adapter into its base: shard by shard, tensor by tensor, in fp32, without ever holding the model.

For each module with an adapter the merged weight is (W0 stands for the base as it is chosen below)

    LoRA, rsLoRA   W0 + s BA                                     2106.09685, 2312.03732
    DoRA           m (W0 + s BA) / ||W0 + s BA|| per output row  2402.09353, equation 5
    embedding      W0 + s (BA)^T; DoRA's norm per column, as PEFT defines it
    full copy      the trained tensor

`dequantized` takes for W0 the values that training computed with: every module that was quantized is quantized and dequantized again, with
LoftQ's correction where there is one, and everything else is rounded to the type it was loaded with. That is the model that was evaluated.
`original` takes the weights on disk, and for LoftQ W + s(BA - B0 A0), since the start B0 A0 stands for W - W0. It can be the better model,
but is not the one that was evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from finetune.config.schema import Quantization
from finetune.errors import VerificationError
from finetune.merging.adapter import Adapter, LowRankUpdate
from finetune.merging.companions import copy_companions, read_model_config, write_index, write_model_config
from finetune.merging.layout import Layout, read_layout
from finetune.model.correction import FILE as CORRECTION
from finetune.model.correction import Corrections
from finetune.model.quantize import roundtrip
from finetune.model.shards import ShardWriter, Slot
from finetune.model.weights import Weights

Base = Literal["dequantized", "original"]


class DoesNotFitError(VerificationError):
    """A merged value is beyond the range of the type it was to be written in; a wider type may do."""


@dataclass(frozen=True, slots=True)
class MergeSource:
    """What is merged, and how its base stood in training."""

    base_dir: Path
    """Directory of the original model: config.json and safetensors."""
    adapter_dir: Path
    """Directory that `PeftModel.save_pretrained` wrote."""
    quantization: Quantization
    """The run's `quantization`."""
    compute_dtype: torch.dtype
    """The type the base was loaded with and computed in."""
    base: Base = "dequantized"
    """What the update is added to."""
    loftq: bool = False
    """Whether the run's `tuning.init` was LoftQ, so that `loftq_base.safetensors` must be there."""
    device: str = "cpu"
    """Where the arithmetic runs. Quantize where training did if the last bit of the base matters."""


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


@dataclass(frozen=True, slots=True)
class _Inputs:
    source: MergeSource
    weights: Weights
    adapter: Adapter
    corrections: Corrections | None
    layout: Layout


def fold(source: MergeSource, destination: Path, dtype: torch.dtype, progress: Callable[[int, int], None] | None = None) -> FoldReport:
    """Write the merged model into the empty or missing directory ``destination``, its floating-point tensors in ``dtype``.

    The output has the base's shards, loads with plain transformers, and carries tokenizer and chat template of the adapter directory,
    or else of the base. ``progress`` is called with (tensors done, of). VerificationError where a file is damaged, a tensor of the
    adapter is not used exactly once, a feature is not understood, or a value does not fit ``dtype``; the directory is then incomplete,
    and `merge` removes it.
    """
    config = read_model_config(source.base_dir)
    layout = read_layout(source.base_dir, source.quantization)
    with ExitStack() as stack:
        weights = stack.enter_context(Weights.of_model(source.base_dir))
        adapter = stack.enter_context(Adapter(source.adapter_dir))
        inputs = _Inputs(source, weights, adapter, _corrections(source, stack), layout)
        _require_fitting(inputs)
        untied = layout.tied and _unties(adapter, layout)
        plan = _plan(inputs, dtype, untied)
        destination.mkdir(parents=True, exist_ok=True)
        total, done = sum(map(len, plan.values())), 0
        for file, outputs in plan.items():
            with ShardWriter(destination / file, {name: output.slot for name, output in outputs.items()}) as writer:
                for name, output in outputs.items():
                    writer.write(name, _cast(_merged(inputs, name, output.source), output.slot.dtype, name))
                    done += 1
                    if progress:
                        progress(done, total)
        adapter.require_all_taken()
    size = write_index(destination, {file: {name: out.slot for name, out in outputs.items()} for file, outputs in plan.items()})
    write_model_config(destination, config, dtype, untied=untied)
    copy_companions(source.base_dir, source.adapter_dir, destination)
    changed = _changed(adapter)
    requantized = len(layout.quantized) if source.base == "dequantized" else 0
    return FoldReport(dtype, len(plan), total, len(changed), requantized, untied, size)


def _corrections(source: MergeSource, stack: ExitStack) -> Corrections | None:
    """LoftQ's file must be there exactly where the run used LoftQ: without it the base would silently be another one."""
    path = source.adapter_dir / CORRECTION
    if path.is_symlink():
        raise VerificationError(f"{CORRECTION} is a symbolic link", where=str(source.adapter_dir), fix="copy the adapter's files")
    if source.loftq:
        return stack.enter_context(Corrections(source.adapter_dir))
    if path.exists():
        raise VerificationError(
            f"{CORRECTION} lies beside an adapter whose run did not use LoftQ",
            where=str(source.adapter_dir),
            fix="merge with the run's own config",
        )
    return None


def _changed(adapter: Adapter) -> set[str]:
    """Names of the weights that the adapter touches."""
    return {f"{module}.weight" for module in adapter.updates} | set(adapter.copies)


def _unties(adapter: Adapter, layout: Layout) -> bool:
    """PEFT trains either side of a tied pair apart from the other, so a change of one unties them."""
    return bool(_changed(adapter) & {layout.embedding, layout.head})


def _require_fitting(inputs: _Inputs) -> None:
    """Every weight the adapter touches must exist with a fitting shape, and every weight of the model must be on disk."""
    weights, layout, where = inputs.weights, inputs.layout, str(inputs.source.base_dir)
    names = set(weights.info)
    # models whose files use other names than their modules are caught when the output is reloaded
    missing = sorted(layout.expected - names) if names <= layout.expected | {layout.head, layout.embedding} else []
    if missing:
        raise VerificationError(
            f"the base model lacks {len(missing)} tensors, {missing[0]} first", where=where, fix="download the model again"
        )
    for name in sorted(_changed(inputs.adapter)):
        shape = _stored_shape(inputs, name)
        given = _adapter_shape(inputs.adapter, name)
        if shape != given:
            raise VerificationError(
                f"the adapter has the shape {given} for {name}, the base {shape or 'no such tensor'}",
                where=where,
                fix="merge with the base model that the adapter was trained on",
            )
    lost = sorted(f"{module}.weight" for module in layout.quantized if f"{module}.weight" not in names)
    if inputs.corrections is not None:
        lost += sorted(inputs.corrections.modules - (set(inputs.adapter.updates) & layout.quantized))
    if lost:
        raise VerificationError(f"quantized modules of the run are not in the base or the adapter, {lost[0]} first", where=where)


def _stored_shape(inputs: _Inputs, name: str) -> tuple[int, ...] | None:
    layout, info = inputs.layout, inputs.weights.info
    source = layout.embedding if layout.tied and name == layout.head and name not in info else name
    return info[source].shape if source in info else None


def _adapter_shape(adapter: Adapter, name: str) -> tuple[int, ...]:
    if name in adapter.copies:
        return adapter.shape(adapter.copies[name])
    update = adapter.updates[name.removesuffix(".weight")]
    d_out, d_in = adapter.shape(update.b)[0], adapter.shape(update.a)[1]
    return (d_in, d_out) if update.embedding else (d_out, d_in)


def _plan(inputs: _Inputs, dtype: torch.dtype, untied: bool) -> dict[str, dict[str, _Output]]:
    """Outputs by file: the base's own, and an output head beside the embedding it was tied to."""
    layout = inputs.layout
    plan: dict[str, dict[str, _Output]] = {file: {} for file in inputs.weights.files}
    for name, info in inputs.weights.info.items():
        slot = Slot(info.shape, dtype if info.dtype.is_floating_point else info.dtype)
        plan[info.file][name] = _Output(name, slot)
        if untied and name == layout.embedding and layout.head and layout.head not in inputs.weights.info:
            plan[info.file][layout.head] = _Output(name, slot)
    return plan


@torch.no_grad()
def _merged(inputs: _Inputs, name: str, source: str) -> Tensor:
    """The tensor ``name`` of the output: ``source`` of the base with what the adapter does to it."""
    adapter = inputs.adapter
    module = name.removesuffix(".weight")
    if name in adapter.copies:
        return adapter.take(adapter.copies[name])
    stored = inputs.weights.read(source)
    update = adapter.updates.get(module) if name.endswith(".weight") else None
    if not stored.is_floating_point() or (update is None and module not in inputs.layout.quantized):
        return stored.to(inputs.source.compute_dtype) if stored.is_floating_point() and inputs.source.base == "dequantized" else stored
    values = _base_values(inputs, module, stored)
    if update is None:
        return values
    return _updated(inputs, values, module, update)


def _base_values(inputs: _Inputs, module: str, stored: Tensor) -> Tensor:
    """W0 of ``module``, fp32 on the device: what training computed with, or the original."""
    source, corrections = inputs.source, inputs.corrections
    stored = stored.to(source.device)
    if source.base == "original":
        return stored.float().clone()
    if module not in inputs.layout.quantized:
        return stored.to(source.compute_dtype).float().clone()
    if corrections is not None and module in corrections.modules:
        base = corrections.read(module).base
        stored = base.added_to(stored, -1.0) if base is not None else stored
    return roundtrip(stored, source.quantization, source.compute_dtype, source.device)


def _updated(inputs: _Inputs, values: Tensor, module: str, update: LowRankUpdate) -> Tensor:
    """``values`` (d_out, d_in) with the adapter's update, in place."""
    a, b = (inputs.adapter.take(key).to(values.device) for key in (update.a, update.b))
    left, right = (a.T, b.T) if update.embedding else (b, a)
    values.addmm_(left, right, alpha=update.scale)
    corrections = inputs.corrections
    if inputs.source.base == "original" and corrections is not None and module in corrections.modules:
        values = corrections.read(module).start.added_to(values, -1.0)
    if update.magnitude is not None:
        along = 0 if update.embedding else 1
        norms = torch.linalg.vector_norm(values, dim=along, keepdim=True)
        magnitude = inputs.adapter.take(update.magnitude).to(values.device)
        if magnitude.numel() != norms.numel():
            raise VerificationError(
                f"the magnitudes of {module} have the shape {tuple(magnitude.shape)}", where=str(inputs.source.adapter_dir)
            )
        values.mul_(magnitude.reshape(norms.shape) / norms)
    return values


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = tensor.to(dtype)
    if cast.is_floating_point() and not cast.isfinite().all():
        if not tensor.isfinite().all():
            raise VerificationError(f"{name} holds NaN or infinity", where="the merged weights", fix="check the base model's files")
        raise DoesNotFitError(f"{name} has values that do not fit {dtype}", where="the merged weights", fix="merge with --dtype bf16")
    return cast
