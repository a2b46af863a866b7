"""Figures side by side with how sure they are, and the answers that go with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.errors import VerificationError
from finetune.runs import RunDirectory
from finetune.sealed import read_json


@dataclass(frozen=True, slots=True)
class Change:
    """How a system differs from another on the same items."""

    difference: float
    low: float | None
    """95 % interval of the difference; None where there are too few items for one."""
    high: float | None
    p: float | None
    """Two-sided."""
    verdict: str
    """``better``, ``worse``, ``no difference seen with n=24``; ``higher`` or ``lower`` where no change was wanted."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity for every system."""

    task: str
    name: str
    """Such as ``trained facts: answer loss``."""
    unit: str
    """``nats/token`` or ``share``; empty for a plain number."""
    n: int
    """Number of items measured."""
    values: dict[str, float]
    """By system."""
    better: str
    """``lower``, ``higher``, or ``same`` where no change is wanted."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % bootstrap interval by system; empty where there are too few items, and in files of older versions."""
    changes: dict[str, Change] = field(default_factory=dict)
    """By every system but the first: of a trained one against its base (`Results.bases`), of any other against the first."""
    between: dict[str, Change] = field(default_factory=dict)
    """By every trained system but the first of them: against that one. Empty for one trained system, and in files of older versions."""


@dataclass(frozen=True, slots=True)
class Headline:
    """A conclusion that rests on several figures, such as what trained facts gained beyond facts never trained."""

    name: str
    """``style``, ``substance``, ``extraction gap`` or ``efficiency``."""
    measure: str
    """The figure that it is taken from, such as ``answer loss``."""
    unit: str
    better: str
    """As of a figure; ``same`` for style, which is no aim of its own."""
    system: str
    change: Change


@dataclass(frozen=True, slots=True)
class Sample:
    """A question and what each system answered."""

    kind: str
    """Such as ``trained as documents``."""
    question: str
    expected: str
    answers: dict[str, str]
    """By system."""


@dataclass(frozen=True, slots=True)
class Results:
    """What `finetune eval` found."""

    run: str
    systems: tuple[str, ...]
    figures: tuple[Figure, ...]
    samples: tuple[Sample, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know, such as what the base is."""
    headlines: tuple[Headline, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)
    """All that is needed to measure the same again."""
    bases: dict[str, str] = field(default_factory=dict)
    """Each trained system -> that of the model it was trained from; empty in files of older versions."""

    def as_dict(self) -> dict[str, Any]:
        """For eval/*.json and `--json`."""
        return asdict(self)

    @property
    def trained(self) -> dict[str, str]:
        """`bases`; of an older file, each system that is no base and no plain model, against the first, as its changes are."""
        targets = self.record.get("systems", {})
        kinds = {name: targets.get(name, {}).get("kind", "run") for name in self.systems}
        if self.bases or list(kinds.values()).count("base") > 1:  # older files with several bases do not say whose each is
            return self.bases
        return {name: self.systems[0] for name in self.systems[1:] if kinds[name] in ("run", "adapter")}

    @property
    def headline(self) -> str | None:
        """What each trained system learned, a sentence each; None where no knowledge was measured."""
        concluded = {one.system for one in self.headlines} or set(self.trained)
        said = {name: self._learned(name, base) for name, base in self.trained.items() if name in concluded}
        found = [f"{name}: {words}" if len(self.trained) > 1 else words for name, words in said.items() if words]
        return "\n".join(found) or None

    def _learned(self, system: str, base: str) -> str | None:
        """Style is what facts never trained gain, substance what trained facts gain beyond it."""
        changes = {figure.name: figure.values[system] - figure.values[base] for figure in self.figures}
        trained, control = changes.get("all trained facts: answer loss"), changes.get("never trained (control): answer loss")
        if trained is None or control is None:
            return None
        said = f"The answer loss of trained facts changed by {trained:+.2f} nats a token, that of facts never trained by {control:+.2f}: "
        substance, bound = (
            next((one.change for one in self.headlines if (one.name, one.measure, one.system) == ("substance", measure, system)), None)
            for measure in ("answer loss", "binding to its question")
        )
        said += f"{control:+.2f} is style, {trained - control:+.2f} goes beyond it{_sure(substance)}."
        if bound is not None:
            said += f" After its own question, not others, an answer gained {bound.difference:+.2f} nats a token{_sure(bound)}."
        return said


def _sure(change: Change | None) -> str:
    if change is None or change.low is None:
        return ""
    return f" (95 % interval {change.low:+.2f} to {change.high:+.2f}; {change.verdict})"


LOFTQ_BASE = "base: the model before its first step, LoftQ's correction included"
"""Note on runs that LoftQ started: their base is not the plainly quantized one."""

RESULTS = "results.json"
"""File of the last evaluation, in the run's `eval/`."""


def read_results(run: RunDirectory, name: str = RESULTS) -> Results | None:
    """What the last evaluation of ``run`` found, or the one in the file ``name``; None where there was none.

    VerificationError where the file is damaged.
    """
    path = run.evaluations / name
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        return _results(found)
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError(f"the stored results are damaged: {error}", where=str(path), fix="run `finetune eval` again") from error


def _results(found: dict[str, Any]) -> Results:
    figures = tuple(_figure(figure) for figure in found["figures"])
    samples = tuple(Sample(**sample) for sample in found["samples"])
    headlines = tuple(Headline(**(one | {"change": Change(**one["change"])})) for one in found.get("headlines", ()))
    notes, record = tuple(found.get("notes", ())), found.get("record", {})
    systems, bases = tuple(found["systems"]), found.get("bases", {})
    return Results(found["run"], systems, figures, samples, found["seconds"], notes, headlines, record, bases)


def _figure(stored: dict[str, Any]) -> Figure:
    intervals = {system: (low, high) for system, (low, high) in stored.get("intervals", {}).items()}
    changes, between = ({system: Change(**one) for system, one in stored.get(key, {}).items()} for key in ("changes", "between"))
    return Figure(**(stored | {"intervals": intervals, "changes": changes, "between": between}))
