"""Figures side by side, and the answers that go with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from finetune.errors import VerificationError
from finetune.runs import RunDirectory
from finetune.sealed import read_json


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity for every system."""

    task: str
    name: str
    """Such as ``trained facts, answer loss``."""
    unit: str
    """``nats/token`` or ``share``; empty for a plain number."""
    n: int
    """Number of items measured."""
    values: dict[str, float]
    """By system."""
    better: str
    """``lower``, ``higher``, or ``same`` where no change is wanted."""


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

    def as_dict(self) -> dict[str, Any]:
        """For eval/*.json and `--json`."""
        return asdict(self)

    @property
    def headline(self) -> str | None:
        """What was learned in a sentence: style is what facts never trained gain, substance what trained facts gain beyond it."""
        changes = {figure.name: figure.values["tuned"] - figure.values["base"] for figure in self.figures}
        trained, control = changes.get("all trained facts: answer loss"), changes.get("never trained (control): answer loss")
        if trained is None or control is None:
            return None
        return (
            f"The answer loss of trained facts changed by {trained:+.2f} nats a token, that of facts never trained by {control:+.2f}: "
            f"{control:+.2f} is style, {trained - control:+.2f} is knowledge."
        )


LOFTQ_BASE = "base: the model before its first step, LoftQ's correction included"
"""Note on runs that LoftQ started: their base is not the plainly quantized one."""

RESULTS = "results.json"
"""File of the last evaluation, in the run's `eval/`."""


def read_results(run: RunDirectory) -> Results | None:
    """What the last evaluation of ``run`` found; None where there was none. VerificationError where the file is damaged."""
    path = run.evaluations / RESULTS
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        figures = tuple(Figure(**figure) for figure in found["figures"])
        samples = tuple(Sample(**sample) for sample in found["samples"])
        return Results(found["run"], tuple(found["systems"]), figures, samples, found["seconds"], tuple(found.get("notes", ())))
    except (KeyError, TypeError) as error:
        raise VerificationError(f"the stored results are damaged: {error}", where=str(path), fix="run `finetune eval` again") from error


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one task found for one system: (name, unit, n, better) -> value, and answers by question."""

    values: dict[tuple[str, str, int, str], float]
    answers: dict[tuple[str, str, str], str]
    """(kind, question, expected) -> answer."""


def side_by_side(task: str, measured: dict[str, Measurement]) -> tuple[list[Figure], list[Sample]]:
    """Join the measurements of all systems on equal questions."""
    first = next(iter(measured.values()))
    figures = [
        Figure(task, name, unit, n, {system: found.values[name, unit, n, better] for system, found in measured.items()}, better)
        for name, unit, n, better in first.values
    ]
    samples = [Sample(*key, {system: found.answers[key] for system, found in measured.items()}) for key in first.answers]
    return figures, samples
