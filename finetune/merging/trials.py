"""One way to write a merge, tried: written, compared with the adapter model, accepted or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from finetune.errors import VerificationError
from finetune.merging.fold import FoldReport, fold
from finetune.merging.identity import require_rows
from finetune.merging.inputs import MergeSource
from finetune.merging.reference import Reference
from finetune.merging.rounding import DoesNotFitError, Rounding
from finetune.merging.verify import Parity, compare, kl_limit, measure_in_fresh_process

GAIN_TO_KEEP = 0.99
"""Share of the validation gain that `auto` keeps."""

Dtype = Literal["bf16", "fp16", "fp32"]
DtypeChoice = Literal["auto", "bf16", "fp16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A type, and how values between two of its own are written."""

    dtype: Dtype
    rounding: Rounding
    seed: int

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded: the arithmetic is fp32."""
        return self.dtype == "fp32"


@dataclass(frozen=True, slots=True)
class Trial:
    """One type that was written and measured."""

    dtype: Dtype
    rounding: Rounding
    accepted: bool
    reason: str
    """Why it was accepted or not, in a sentence."""
    parity: Parity | None
    """None where it could not be written or loaded."""
    identity: float | None
    """Largest relative error of a merged weight against the live one; None on the original base."""
    seed: int | None = None
    """Of stochastic rounding; None where nothing is drawn."""

    @property
    def name(self) -> str:
        """Type and rounding in words."""
        return _named(self.dtype, self.rounding)

    def as_json(self) -> dict[str, object]:
        """For `merge.json`."""
        return {**asdict(self), "parity": self.parity.as_json() if self.parity else None}


def candidates(dtype: DtypeChoice, rounding: Rounding, seed: int, *, every: bool) -> Iterator[Candidate]:
    """What is tried, from small to large: the types that ``dtype`` allows, or ``every`` type and rounding."""
    for name in DTYPES:
        if every or dtype in ("auto", name):
            ways: tuple[Rounding, ...] = ("nearest", "stochastic") if every else (rounding,)
            yield from (Candidate(name, way, seed) for way in (ways if name != "fp32" else ("nearest",)))


def attempt(
    folder: Path,
    source: MergeSource,
    reference: Reference,
    candidate: Candidate,
    progress: Callable[[int, int], None] | None,
    *,
    automatic: bool,
) -> tuple[Trial, FoldReport | None]:
    """Write ``source`` as ``candidate`` into the empty ``folder`` and measure it; the report is None where it does not hold the weights."""
    dtype, rounding, seed = DTYPES[candidate.dtype], candidate.rounding, candidate.seed
    drawn = seed if rounding == "stochastic" else None
    try:
        written = fold(source, folder, dtype, progress, rounding, seed)
    except DoesNotFitError as error:
        return Trial(candidate.dtype, rounding, False, error.problems[0].what, None, None, drawn), None
    try:
        identity = require_rows(reference.rows, folder, rounding, seed) if source.base == "dequantized" else None
    except VerificationError as error:
        # a wider type may hold what this one rounds away: it is tried next
        return Trial(candidate.dtype, rounding, False, error.problems[0].what, None, None, drawn), None
    parity = compare(reference.trained, measure_in_fresh_process(folder, reference.probe, reference.device), reference.loss_base)
    reason = _refusal(parity, source, dtype, automatic=automatic)
    return Trial(
        candidate.dtype, rounding, reason is None, reason or _acceptance(parity, _named(candidate.dtype, rounding)), parity, identity, drawn
    ), written


def _refusal(parity: Parity, source: MergeSource, dtype: torch.dtype, *, automatic: bool) -> str | None:
    """Why a merge is not good enough; None where it is."""
    # the original base is another model by intent: how much of the gain it keeps decides, not the distance
    computed = torch.bfloat16 if source.adapter_dtype == torch.bfloat16 else source.compute_dtype
    limit = kl_limit(dtype, computed, source.quantization.method) if source.base == "dequantized" else float("inf")
    found = parity.violations(limit)
    if found:
        return "; ".join(problem.what for problem in found)
    if automatic and dtype != torch.float32 and parity.gain_kept is not None and parity.gain_kept < GAIN_TO_KEEP:
        return f"it keeps {parity.gain_kept:.1%} of the validation gain, less than {GAIN_TO_KEEP:.0%}"
    return None


def _named(dtype: Dtype, rounding: Rounding) -> str:
    return dtype if rounding == "nearest" else f"{dtype} with stochastic rounding"


def _acceptance(parity: Parity, name: str) -> str:
    if parity.gain_kept is None:
        return f"{name} agrees with the adapter model (KL {parity.mean_kl:.2g}); training gained too little to tell what share is kept"
    return f"{name} keeps {parity.gain_kept:.1%} of the validation gain"
