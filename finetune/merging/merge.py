"""`merge`: an adapter and its base become one model directory, proven to behave like the adapter model, or nothing at all.

The output is written to a temporary sibling, reloaded by plain transformers in a fresh process, compared with what the adapter model
computed, and only then renamed to its destination.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finetune.errors import Problem, VerificationError
from finetune.merging.bases import BaseFigures, compare_bases, why_base
from finetune.merging.destination import REPORT, clear_leftovers, require_destination
from finetune.merging.fold import FoldReport
from finetune.merging.inputs import MergeSource
from finetune.merging.reference import Reference, probe_of, reference_of
from finetune.merging.reload import Example
from finetune.merging.rounding import Rounding
from finetune.merging.trials import Candidate, Dtype, DtypeChoice, Trial, attempt, candidates
from finetune.merging.verify import Parity
from finetune.sealed import sealed_directory, write_json, write_text

_CANDIDATE = ".candidate"


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How a merge is written."""

    dtype: DtypeChoice = "auto"
    """`auto`: the smallest of bf16, fp16 and fp32 that keeps 99 % of the validation gain."""
    rounding: Rounding = "nearest"
    """How values between two of the type's are written."""
    seed: int = 0
    """Of stochastic rounding."""
    compare_dtypes: bool = False
    """Whether every type and rounding is written and measured, not only those up to the one that is kept."""
    compare_bases: bool = False
    """Whether the merge onto the other base is written and measured too; needs a reference with general text."""
    force: bool = False
    """Whether an earlier merge at the destination may be replaced."""
    progress: Callable[[int, int], None] | None = None
    """Called with (tensors done, of) for each type that is tried."""
    card: Callable[[MergeReport], str] | None = None
    """Makes the model card, README.md."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written, and the proof."""

    destination: Path
    base: str
    dtype: Dtype
    """The type that was chosen."""
    rounding: Rounding
    reason: str
    parity: Parity
    fold: FoldReport
    why_base: str
    """Why the update was added to this base, in a line."""
    trials: tuple[Trial, ...]
    """Every type that was tried, in order."""
    bases: tuple[BaseFigures, ...] = ()
    """The merge onto either base, where they were compared."""

    @property
    def chosen(self) -> Trial:
        """The trial that was kept."""
        return next(trial for trial in self.trials if trial.parity is self.parity)

    def as_json(self) -> dict[str, object]:
        """The content of `merge.json`."""
        return {
            "base": self.base,
            "why_base": self.why_base,
            "dtype": self.dtype,
            "rounding": self.rounding,
            "seed": self.chosen.seed,
            "reason": self.reason,
            "parity": self.parity.as_json(),
            "fold": {**asdict(self.fold), "dtype": self.dtype},
            "trials": [trial.as_json() for trial in self.trials],
            "bases": [asdict(figures) for figures in self.bases],
        }


def merge(model: Any, source: MergeSource, destination: Path, rows: Sequence[Example], options: MergeOptions | None = None) -> MergeReport:
    """Merge ``source`` into ``destination``, verified on ``rows`` against ``model``, the live PEFT model that it was trained as.

    ``model`` is in eval mode on its restored base. ``rows`` should be validation rows: the loss is taken over all their supervised tokens.
    Raises DataError where no row has a supervised token, and what `merge_measured` does.
    """
    require_destination(destination.absolute(), (source.base_dir, source.adapter_dir), force=bool(options and options.force))
    return merge_measured(reference_of(model, source, probe_of(rows)), source, destination, options or MergeOptions())


def merge_measured(reference: Reference, source: MergeSource, destination: Path, options: MergeOptions) -> MergeReport:
    """Merge ``source`` into ``destination``, verified against ``reference``; the model that this was measured on may be gone.

    Raises ConfigError where the destination is taken or unfit, VerificationError where the adapter, the base or the result is not what it
    must be, HardwareError where the disk is full; the destination is then as it was.
    """
    destination = destination.absolute()
    clear_leftovers(destination)
    require_destination(destination, (source.base_dir, source.adapter_dir), force=options.force)
    with sealed_directory(destination) as temporary:
        report = _first_accepted(temporary, source, reference, options, destination)
        if options.compare_bases:
            figures = compare_bases(temporary, temporary / _CANDIDATE, source, reference, report.dtype)
            report = replace(report, bases=figures)
        write_json(temporary / REPORT, report.as_json())
        if options.card:
            write_text(temporary / "README.md", options.card(report))
    return report


def _first_accepted(temporary: Path, source: MergeSource, reference: Reference, options: MergeOptions, destination: Path) -> MergeReport:
    """Try the types from small to large until one passes, which is left in ``temporary``; VerificationError with the figures of all where
    none does."""
    automatic, folder = options.dtype == "auto", temporary / _CANDIDATE
    trials: list[Trial] = []
    found: MergeReport | None = None
    for candidate in candidates(options.dtype, options.rounding, options.seed, every=options.compare_dtypes):
        if found and not options.compare_dtypes:
            break
        folder.mkdir()
        trial, written = attempt(folder, source, reference, candidate, options.progress, automatic=automatic)
        trials.append(trial)
        if found is None and _is_wanted(candidate, options) and trial.accepted and trial.parity and written:
            why = why_base(source.base, quantized=source.quantization.method != "none")
            found = MergeReport(destination, source.base, trial.dtype, trial.rounding, trial.reason, trial.parity, written, why, ())
            for path in folder.iterdir():
                path.rename(temporary / path.name)
        shutil.rmtree(folder)
    if found:
        return replace(found, trials=tuple(trials))
    raise VerificationError.from_problems(
        Problem(
            f"merged as {trial.dtype}: {trial.reason}", str(source.adapter_dir), "see the run's quantization and base; nothing was written"
        )
        for trial in trials
    )


def _is_wanted(candidate: Candidate, options: MergeOptions) -> bool:
    """Whether ``candidate`` may be kept, or is measured for comparison alone."""
    return options.dtype in ("auto", candidate.dtype) and candidate.rounding in (options.rounding, "nearest" if candidate.is_exact else "")
