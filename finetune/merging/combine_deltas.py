"""What each adapter adds to each weight, as a dense fp32 tensor, and what a plan makes of several: one weight at a time.

Conventions. An adapter's update of a weight is the difference between what merging it alone would write and where training began, on the
base that the plan names (`combine_members`). For LoRA that is s BA itself and not a difference of large numbers. A weight that an adapter
does not touch has the update zero: it takes part in no election, but an average divides by all adapters. Whole copies, trained rows,
biases and norms are weights like all others. A head that is tied to its embedding follows the embedding of every adapter that keeps the
two equal; where one adapter parts them, the combination has them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finetune.config.combine import Average, DareLinear, DareTies, MagnitudePrune, Plan, Ties
from finetune.errors import VerificationError
from finetune.merging import algebra
from finetune.merging.adapter import located
from finetune.merging.combine_members import Member
from finetune.merging.fitting import require_fitting, settle_tie, unties, with_new_rows
from finetune.merging.inputs import Inputs, open_inputs
from finetune.merging.updates import LowRankUpdate, Scaling
from finetune.model.quantize import roundtrip
from finetune.model.shards import Slot
from finetune.model.tokens import enlarged

Progress = Callable[[str, int], None]


@dataclass(slots=True)
class Updates:
    """The open files of all members, and the updates in them; use inside the ``stack`` that opened it."""

    inputs: tuple[Inputs, ...]
    untied: bool
    """Whether an adapter parts a head from the embedding it was tied to."""
    _parting: tuple[bool, ...] = field(default=())

    @classmethod
    def open(cls, members: Sequence[Member], stack: ExitStack) -> Updates:
        """Open and check the files; VerificationError where one is damaged, not understood, or does not fit the base."""
        inputs = tuple(open_inputs(member.source, stack) for member in members)
        for each in inputs:
            with located(str(each.source.adapter_dir)):
                require_fitting(each)
                settle_tie(each)
        parting = tuple(unties(each) for each in inputs)
        return cls(inputs, any(parting), parting)

    # --- the base ---

    def slots(self, dtype: torch.dtype) -> dict[str, dict[str, Slot]]:
        """Names, shapes and types of the combined model's tensors, by file: the base's, with a head of its own where it is parted."""
        first, layout = self.inputs[0], self.inputs[0].layout
        plan: dict[str, dict[str, Slot]] = {file: {} for file in first.weights.files}
        for name, info in first.weights.info.items():
            slot = Slot(with_new_rows(first, name, info.shape), dtype if info.dtype.is_floating_point else info.dtype)
            plan[info.file][name] = slot
            if self.untied and name == layout.embedding and layout.head and layout.head not in first.weights.info:
                plan[info.file][layout.head] = slot
        return plan

    def base(self, name: str) -> Tensor:
        """Where training began for the weight ``name``, fp32; the weight on disk on the original base. Integer tensors as they are."""
        first = self.inputs[0]
        values = self._loaded(first, name)
        module = name.removesuffix(".weight")
        corrections = first.corrections
        if first.source.base == "dequantized" and corrections is not None and module in corrections.modules:
            values = corrections.read(module).start.added_to(values)
        return values

    def _loaded(self, inputs: Inputs, name: str) -> Tensor:
        """W or Q of ``name`` under one adapter, with the rows of new tokens."""
        source, layout, module = inputs.source, inputs.layout, name.removesuffix(".weight")
        stored = inputs.weights.read(self._stored_name(name)).to(source.device)
        if not stored.is_floating_point():
            return stored
        if source.base == "dequantized" and name != module and module in layout.quantized:
            earlier = inputs.corrections.read(module).base if inputs.corrections and module in inputs.corrections.modules else None
            weight = earlier.added_to(stored, -1.0) if earlier is not None else stored
            return roundtrip(weight, source.quantization, source.compute_dtype, source.device)
        loaded = stored.to(source.compute_dtype) if source.base == "dequantized" else stored
        return (enlarged(loaded, source.new_ids) if name in (layout.embedding, layout.head) else loaded).float()

    def _stored_name(self, name: str) -> str:
        first = self.inputs[0]
        return first.layout.embedding if name == first.layout.head and name not in first.weights.info else name

    # --- the updates ---

    def touched(self) -> set[str]:
        """Weights of the combined model that at least one adapter changes."""
        names = {name for slots in self.slots(torch.float32).values() for name in slots}
        return {name for name in names if any(self.touches(place, name) for place in range(len(self.inputs)))}

    def touches(self, place: int, name: str) -> bool:
        """Whether the adapter at ``place`` changes the weight ``name``."""
        inputs = self.inputs[place]
        return self._own_name(place, name) in inputs.adapter.touched(inputs.weights.info)

    def _own_name(self, place: int, name: str) -> str:
        """The weight by whose update this adapter changes ``name``: of a pair that it keeps tied, the embedding."""
        layout = self.inputs[place].layout
        return layout.embedding if layout.tied and name == layout.head and not self._parting[place] else name

    def update(self, place: int, name: str) -> Tensor:
        """What the adapter at ``place``, which must touch it, adds to the weight ``name``: fp32, a tensor of its own."""
        inputs, own = self.inputs[place], self._own_name(place, name)
        inputs.adapter.release(name)
        with located(str(inputs.source.adapter_dir)), torch.no_grad():
            delta = self._update(inputs, own, name)
        if not delta.isfinite().all():
            raise VerificationError(f"the update of {name} is not finite", where=str(inputs.source.adapter_dir))
        return delta

    def _update(self, inputs: Inputs, own: str, name: str) -> Tensor:
        adapter, source = inputs.adapter, inputs.source

        def take(key: str) -> Tensor:
            return adapter.take(key, name).to(source.device)

        if own in adapter.copies:
            return take(adapter.copies[own]) - self.base(own)
        if own in adapter.rows:
            return self._rows(inputs, own, take(adapter.rows[own].key))
        module, _, part = own.rpartition(".")
        update = adapter.updates[module]
        if part == "bias":
            bias = self._loaded(inputs, own)
            return update.on_weight(bias[:, None].clone(), take, _unchanged)[:, 0] - bias
        corrections = inputs.corrections
        start = corrections.read(module).start if corrections is not None and module in corrections.modules else None
        if isinstance(update, Scaling) or (isinstance(update, LowRankUpdate) and update.magnitude is not None):
            # what a product makes of the whole weight: its difference to the start
            off = start if source.base == "original" else None
            corrected = (lambda found: off.added_to(found, -1.0)) if off is not None else _unchanged
            return update.on_weight(self._loaded(inputs, own).clone(), take, corrected) - self.base(own)
        zeros = torch.zeros(self._shape(inputs, own), device=source.device)
        return update.on_weight(zeros, take, (lambda found: start.added_to(found, -1.0)) if start is not None else _unchanged)

    def _shape(self, inputs: Inputs, own: str) -> tuple[int, ...]:
        return with_new_rows(inputs, own, inputs.weights.info[self._stored_name(own)].shape)

    def _rows(self, inputs: Inputs, own: str, trained: Tensor) -> Tensor:
        """Zero but for the trained rows."""
        base, ids = self.base(own), list(inputs.adapter.rows[own].ids)
        if max(ids) >= len(base):
            raise VerificationError(f"the adapter has a row {max(ids)} for {own}, which has {len(base)}")
        if inputs.source.base == "dequantized":
            trained = trained.to(inputs.source.compute_dtype).float()  # as the adapter model rounds them
        delta = torch.zeros_like(base)
        delta[ids] = trained - base[ids]
        return delta

    def require_all_used(self) -> None:
        """VerificationError where a tensor of an adapter found no place."""
        for inputs in self.inputs:
            inputs.adapter.require_all_taken()


def _unchanged(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, slots=True)
class Combination:
    """The combined update of every weight under a plan."""

    updates: Updates
    plan: Plan
    weights: tuple[float, ...]
    thresholds: tuple[float, ...]
    """For trimming over whole models: the magnitude from which an element of each adapter is kept; else empty."""

    @classmethod
    def of(cls, updates: Updates, plan: Plan, weights: tuple[float, ...], advance: Progress = lambda *_: None) -> Combination:
        """Reads every update twice where elements are trimmed over whole models."""
        thresholds: tuple[float, ...] = ()
        if isinstance(plan, Ties | MagnitudePrune) and plan.trim == "model" and plan.density < 1.0:
            names = sorted(updates.touched())
            thresholds = tuple(
                algebra.threshold_of(_Counted(updates, place, names, advance), plan.density) for place in range(len(updates.inputs))
            )
        return cls(updates, plan, weights, thresholds)

    def update(self, name: str) -> Tensor:
        """The combined update of the weight ``name``, which at least one adapter touches: fp32."""
        places = [place for place in range(len(self.weights)) if self.updates.touches(place, name)]
        found, weights = _Sparse(self, name, places), [self.weights[place] for place in places]
        if isinstance(self.plan, Ties | DareTies):
            return algebra.ties(found, weights, self.plan.scale)
        return algebra.task_arithmetic(found, weights)

    def sparse(self, place: int, name: str) -> Tensor:
        """The update of one adapter after trimming or dropping."""
        delta = self.updates.update(place, name)
        match self.plan:
            case Ties() | MagnitudePrune() if self.thresholds:
                return algebra.above(delta, self.thresholds[place])
            case Ties() | MagnitudePrune() if self.plan.density < 1.0:
                return algebra.magnitude_prune(delta, self.plan.density)
            case DareLinear() | DareTies():
                return algebra.dare(delta, self.plan.density, algebra.draw_of(self.plan.seed, place, name))
        return delta

    def weight(self, name: str, *, touched: bool) -> Tensor:
        """The combined weight, fp32 where it is a number."""
        return self.update(name).add_(self.updates.base(name)) if touched else self.updates.base(name)


@dataclass(frozen=True, slots=True)
class _Sparse:
    """The updates of one weight, computed anew at each iteration, so that one is in memory at a time."""

    combination: Combination
    name: str
    places: Sequence[int]

    def __iter__(self) -> Iterator[Tensor]:
        return (self.combination.sparse(place, self.name) for place in self.places)


@dataclass(frozen=True, slots=True)
class _Counted:
    """All updates of one adapter."""

    updates: Updates
    place: int
    names: Sequence[str]
    advance: Progress

    def __iter__(self) -> Iterator[Tensor]:
        for name in self.names:
            if self.updates.touches(self.place, name):
                self.advance("trimming", 1)
                yield self.updates.update(self.place, name)


def describe(plan: Plan, weights: Sequence[float]) -> str:
    """The formula in a line."""
    if isinstance(plan, Average):
        return f"the mean of {len(weights)} updates"
    factors = ", ".join(f"{weight:g}" for weight in weights)
    kept = getattr(plan, "density", None)
    share = f", {kept:.0%} of each kept" if kept is not None and math.isfinite(kept) else ""
    return f"{plan.method} with the weights {factors}{share}"
