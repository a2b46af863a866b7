"""`merge`: an adapter and its base become one model directory, proven to behave like the adapter model, or nothing at all.

The output is written to a temporary sibling, reloaded by plain transformers in a fresh process, compared with the live adapter model, and
only then renamed to its destination.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.errors import Problem, VerificationError
from finetune.merging.destination import REPORT, require_destination
from finetune.merging.fold import DoesNotFitError, FoldReport, fold
from finetune.merging.identity import require_identity
from finetune.merging.inputs import MergeSource
from finetune.merging.reference import Reference, probe_of, reference_of
from finetune.merging.reload import Example
from finetune.merging.verify import Parity, compare, kl_limit, measure_in_fresh_process
from finetune.runs import sealed_directory, write_json

GAIN_TO_KEEP = 0.99
"""Share of the validation gain that `auto` keeps."""

DtypeChoice = Literal["auto", "bf16", "fp16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How a merge is written."""

    dtype: DtypeChoice = "auto"
    """`auto`: the smallest of bf16, fp16 and fp32 that keeps 99 % of the validation gain."""
    force: bool = False
    """Whether an earlier merge at the destination may be replaced."""
    progress: Callable[[int, int], None] | None = None
    """Called with (tensors done, of) for each type that is tried."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One type that was written and measured."""

    dtype: str
    accepted: bool
    reason: str
    """Why it was accepted or not, in a sentence."""
    parity: Parity | None
    """None where it could not be written or loaded."""
    identity: float | None
    """Largest relative error of a merged weight against the live one; None on the original base."""

    def as_json(self) -> dict[str, object]:
        """For `merge.json`."""
        return {**asdict(self), "parity": self.parity.as_json() if self.parity else None}


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written, and the proof."""

    destination: Path
    base: str
    dtype: str
    """The type that was chosen."""
    reason: str
    parity: Parity
    fold: FoldReport
    trials: tuple[Trial, ...]
    """Every type that was tried, in order."""

    def as_json(self) -> dict[str, object]:
        """The content of `merge.json`."""
        return {
            "base": self.base,
            "dtype": self.dtype,
            "reason": self.reason,
            "parity": self.parity.as_json(),
            "fold": {**asdict(self.fold), "dtype": self.dtype},
            "trials": [trial.as_json() for trial in self.trials],
        }


def merge(model: Any, source: MergeSource, destination: Path, rows: Sequence[Example], options: MergeOptions | None = None) -> MergeReport:
    """Merge ``source`` into ``destination``, verified on ``rows`` against ``model``, the live PEFT model that it was trained as.

    ``model`` is in eval mode on its restored base. ``rows`` should be validation rows: the loss is taken over all their supervised tokens.
    Raises ConfigError where the destination is taken or unfit, DataError where no row has a supervised token, VerificationError where the
    adapter, the base or the result is not what it must be, HardwareError where the disk is full; the destination is then as it was.
    """
    options = options or MergeOptions()
    destination = destination.absolute()
    require_destination(destination, (source.base_dir, source.adapter_dir), force=options.force)
    reference = reference_of(model, source, probe_of(rows))
    with sealed_directory(destination) as temporary:
        report = _first_accepted(temporary, source, reference, options, destination)
        write_json(temporary / REPORT, report.as_json())
    return report


def _first_accepted(temporary: Path, source: MergeSource, reference: Reference, options: MergeOptions, destination: Path) -> MergeReport:
    """Try the types from small to large until one passes; VerificationError with the figures of all where none does."""
    automatic = options.dtype == "auto"
    trials: list[Trial] = []
    for name in _DTYPES if automatic else [options.dtype]:
        shutil.rmtree(temporary)
        temporary.mkdir()
        trial, written = _try(temporary, source, reference, name, options)
        trials.append(trial)
        if trial.accepted and trial.parity and written:
            return MergeReport(destination, source.base, name, trial.reason, trial.parity, written, tuple(trials))
    raise VerificationError.from_problems(
        Problem(
            f"merged as {trial.dtype}: {trial.reason}", str(source.adapter_dir), "see the run's quantization and base; nothing was written"
        )
        for trial in trials
    )


def _try(temporary: Path, source: MergeSource, reference: Reference, name: str, options: MergeOptions) -> tuple[Trial, FoldReport | None]:
    """Write ``source`` in one type and measure it."""
    dtype = _DTYPES[name]
    try:
        written = fold(source, temporary, dtype, options.progress)
    except DoesNotFitError as error:
        return Trial(name, False, error.problems[0].what, None, None), None
    try:
        identity = require_identity(reference.model, temporary, source.compute_dtype) if source.base == "dequantized" else None
    except VerificationError as error:
        # a wider type may hold what this one rounds away: it is tried next
        return Trial(name, False, error.problems[0].what, None, None), None
    parity = compare(reference.trained, measure_in_fresh_process(temporary, reference.probe, reference.device), reference.loss_base)
    reason = _refusal(parity, source, dtype, automatic=options.dtype == "auto")
    return Trial(name, reason is None, reason or _acceptance(parity, name), parity, identity), written


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


def _acceptance(parity: Parity, name: str) -> str:
    if parity.gain_kept is None:
        return f"{name} agrees with the adapter model (KL {parity.mean_kl:.2g}); training gained too little to tell what share is kept"
    return f"{name} keeps {parity.gain_kept:.1%} of the validation gain"
