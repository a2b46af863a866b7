"""The other side of a combination's proof: the dense sum in memory, and single rows by other code than the one that writes.

Nothing was ever trained as the combination, so there is no live model to compare with. Two things stand in for it. The whole model in fp32
in this process, with every update put into its weights: what plain transformers loads from the written files must compute the same. And
rows of every weight, chosen at random, whose updates PEFT's own functions combine, in fp64: what is in the files must be those numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import merge_utils
from torch import Tensor, nn

from finetune.config.combine import DareTies, Ties
from finetune.config.schema import NoQuantization
from finetune.errors import VerificationError
from finetune.hardware import detect
from finetune.merging.combine_deltas import Combination, Progress
from finetune.merging.identity import LiveRows
from finetune.merging.reload import Measurement, Probe, measure
from finetune.model.load import load_base
from finetune.model.tokens import enlarge

_ROWS = 16
"""Rows of each weight that are compared."""
_MEMORY_SHARE = 0.4
"""Of this machine's memory that the model in fp32 may take; a larger one is compared by rows alone."""


@dataclass(slots=True)
class Dense:
    """The combination in memory."""

    model: Any
    probe: Probe
    device: str
    loss_base: float
    """Of the weights that training began at."""
    exact: Measurement
    """Of the combined weights in fp32."""

    def with_weights(self, weights: Iterator[tuple[str, Tensor]]) -> Measurement:
        """What the model computes with other ``weights`` in the place of some."""
        for name, value in weights:
            _put(self.model, name, value)
        return measure(self.model, self.probe, self.device)


def fits_in_memory(combination: Combination) -> bool:
    """Whether the model in fp32 can be held here."""
    info = combination.updates.inputs[0].weights.info.values()
    return sum(4 * torch.Size(tensor.shape).numel() for tensor in info) <= _MEMORY_SHARE * detect().memory_bytes


@torch.no_grad()
def dense_model(combination: Combination, probe: Probe, advance: Progress) -> Dense:
    """Put the combination into a model in memory and measure it, before and after."""
    updates, source = combination.updates, combination.updates.inputs[0].source
    model = load_base(source.base_dir, NoQuantization(method="none"), torch.float32, torch.device(source.device)).eval()
    enlarge(model, source.new_ids)
    if updates.untied:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    touched = updates.touched()
    for slots in updates.slots(torch.float32).values():
        for name in slots:
            if source.base == "dequantized" or name in touched:
                _put(model, name, updates.base(name))
    loss_base = measure(model, probe, source.device).loss
    for name in sorted(touched):
        _put(model, name, combination.weight(name, touched=True))
        advance("in memory", 1)
    return Dense(model, probe, source.device, loss_base, measure(model, probe, source.device))


def _put(model: Any, name: str, value: Tensor) -> None:
    module, _, part = name.rpartition(".")
    parameter = getattr(model.get_submodule(module), part, None)
    if not isinstance(parameter, nn.Parameter) or parameter.shape != value.shape:
        if value.is_floating_point():
            raise VerificationError(f"the model has no weight {name} of the shape {tuple(value.shape)}", fix="check base.id")
        return  # a buffer of whole numbers, which no adapter touches
    parameter.data.copy_(value)


@torch.no_grad()
def sampled_rows(combination: Combination) -> tuple[LiveRows, ...]:
    """Up to 16 rows of each weight of the combination: untouched ones of the base, others combined by PEFT's functions in fp64."""
    updates = combination.updates
    found = []
    for slots in updates.slots(torch.float32).values():
        for name in slots:
            base = updates.base(name)
            if not base.is_floating_point():
                continue
            places = _drawn(name, len(base)).to(base.device)
            rows = base[places].double()
            touching = [place for place in range(len(combination.weights)) if updates.touches(place, name)]
            if touching:
                parts = torch.stack([combination.weights[place] * combination.sparse(place, name)[places].double() for place in touching])
                rows += _combined(parts, combination)
            found.append(LiveRows(name, places.cpu(), rows.float().cpu()))
    return tuple(found)


def _drawn(name: str, count: int) -> Tensor:
    """(n,) int64: which rows of ``name`` are compared."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randperm(count, generator=generator)[:_ROWS].sort().values


def _combined(parts: Tensor, combination: Combination) -> Tensor:
    """(rows, ...) of weighed updates (T, rows, ...), by PEFT's functions; where they stray from the paper, a tie of signs, zero."""
    if not isinstance(combination.plan, Ties | DareTies):
        total: Tensor = merge_utils.task_arithmetic(list(parts), torch.ones(len(parts), dtype=parts.dtype, device=parts.device))
        return total
    merged: Tensor = merge_utils.disjoint_merge(parts, merge_utils.calculate_majority_sign_mask(parts))
    # the election itself is by sums in fp32: an exact tie is no vote for plus
    return merged.where(parts.float().sum(0) != 0, 0.0) * combination.plan.scale


def weights_from(factors: Mapping[str, tuple[Tensor, Tensor, bool]], combination: Combination) -> Iterator[tuple[str, Tensor]]:
    """Base plus B A (transposed for an embedding) by the name of the weight, from (B, A, whether of an embedding)."""
    for name, (b, a, embedding) in factors.items():
        base = combination.updates.base(name)
        product = (b @ a).to(base.device)
        yield name, base + (product.T if embedding else product)
