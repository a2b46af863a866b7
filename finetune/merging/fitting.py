"""Whether an adapter fits its base: every shape, and what becomes of embeddings that the output head is tied to."""

from __future__ import annotations

import torch

from finetune.errors import VerificationError
from finetune.merging.adapter import Adapter
from finetune.merging.inputs import Inputs
from finetune.merging.updates import Sides


def unties(inputs: Inputs) -> bool:
    """Whether the head leaves the embedding it was tied to: PEFT trains either side apart from the other, but for copies that it was told
    to keep equal, and for single rows, which a tied head follows."""
    adapter, layout = inputs.adapter, inputs.layout
    if not layout.tied:
        return False
    pair = {layout.embedding, layout.head}
    apart = {f"{module}.weight" for module in adapter.updates} | (set() if adapter.keeps_tie else set(adapter.copies))
    if apart & pair and (set(adapter.rows) & pair or adapter.keeps_tie):
        raise VerificationError("the adapter changes tied embeddings in two ways at once", fix="merge it with the tool that made it")
    if layout.head in adapter.rows:
        raise VerificationError("the adapter trains rows of a head that is tied to the embeddings", fix="train those of the embeddings")
    return bool(apart & pair)


def settle_tie(inputs: Inputs) -> None:
    """Of a tied pair that trained as one, the copies of both sides must be equal, and one of them is written."""
    adapter, head = inputs.adapter, inputs.layout.head
    if not adapter.keeps_tie:
        return
    pair = [adapter.copies.get(name) for name in (inputs.layout.embedding, head) if name]
    if not inputs.layout.tied or len(pair) != 2 or pair[0] is None or pair[1] is None:
        raise VerificationError(
            "the adapter uses ensure_weight_tying, but does not hold both sides of a tied pair of embedding and head",
            where=str(inputs.source.adapter_dir),
            fix="merge it with the tool that made it",
        )
    one, other = (adapter.take(key, "the tied pair") for key in pair if key)
    if not torch.equal(one, other):
        raise VerificationError("the copies of the tied embedding and head differ", where=str(inputs.source.adapter_dir))


def require_fitting(inputs: Inputs) -> None:
    """Every weight the adapter touches must exist with a fitting shape, and every weight of the model must be on disk."""
    weights, layout, where = inputs.weights, inputs.layout, str(inputs.source.base_dir)
    names = set(weights.info)
    # models whose files use other names than their modules are caught when the output is reloaded
    missing = sorted(layout.expected - names) if names <= layout.expected | {layout.head, layout.embedding} else []
    if missing:
        raise VerificationError(
            f"the base model lacks {len(missing)} tensors, {missing[0]} first", where=where, fix="download the model again"
        )
    for name in sorted(inputs.adapter.touched(names)):
        shape = _stored_shape(inputs, name)
        given = _adapter_shape(inputs.adapter, name)
        if shape is None or not _fits(given, shape):
            raise VerificationError(
                f"the adapter has the shape {_shown(given)} for {name}, the base {shape or 'no such tensor'}",
                where=where,
                fix="merge with the base model that the adapter was trained on",
            )
    lost = sorted(f"{module}.weight" for module in layout.quantized if f"{module}.weight" not in names)
    if inputs.corrections is not None:
        lost += sorted(inputs.corrections.modules - (set(inputs.adapter.updates) & layout.quantized))
    if lost:
        raise VerificationError(f"quantized modules of the run are not in the base or the adapter, {lost[0]} first", where=where)


def _stored_shape(inputs: Inputs, name: str) -> tuple[int, ...] | None:
    """Shape of ``name`` with the rows of new tokens; None where the base has no such tensor."""
    layout, info = inputs.layout, inputs.weights.info
    source = layout.embedding if layout.tied and name == layout.head and name not in info else name
    if source not in info:
        return None
    return with_new_rows(inputs, name, info[source].shape)


def with_new_rows(inputs: Inputs, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The ``shape`` of ``name`` once embedding and head have rows for new tokens."""
    ids = inputs.source.new_ids
    return (max(shape[0], ids[-1] + 1), *shape[1:]) if ids and name in (inputs.layout.embedding, inputs.layout.head) else shape


def _adapter_shape(adapter: Adapter, name: str) -> tuple[int | None, ...]:
    """The shape that the adapter's tensors for ``name`` ask for, None where any number will do."""
    if name in adapter.copies:
        return adapter.shape(adapter.copies[name])
    if name in adapter.rows:
        # rows cannot be more than the weight has: that is checked where they are put in
        return None, adapter.shape(adapter.rows[name].key)[1]
    module, _, part = name.rpartition(".")
    sides: Sides = adapter.updates[module].sides(adapter.shape)
    return sides if part == "weight" else sides[:1]


def _fits(given: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(given) == len(shape) and all(side in (None, length) for side, length in zip(given, shape, strict=True))


def _shown(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if side is None else str(side) for side in shape) + ")"
