"""What one task measured for each system, joined into figures with intervals and verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from finetune.evaluation.results import Figure, Sample
from finetune.evaluation.statistics import Quantity, compare


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one task found for one system. Every system's has the same quantities and questions, in the same order."""

    quantities: tuple[Quantity, ...]
    answers: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """(kind, question, expected) -> answer."""

    def named(self, name: str) -> Quantity | None:
        """The quantity of that name; None where it was not measured."""
        return next((one for one in self.quantities if one.name == name), None)


def alike(name: str, measured: dict[str, Measurement], notes: list[str]) -> dict[str, Measurement]:
    """Only what was measured of every model, such as of those that have a chat template; what is left out is noted."""
    wanted = [[one.name for one in found.quantities] for found in measured.values()]
    shared = [one for one in wanted[0] if all(one in names for names in wanted)]
    left = sorted({one for names in wanted for one in names} - set(shared))
    if left:
        notes.append(f"{name}: not measured of every model, and left out: {', '.join(left)}")
    return {
        column: Measurement(tuple(one for quantity in shared if (one := found.named(quantity)) is not None), found.answers)
        for column, found in measured.items()
    }


def side_by_side(
    task: str, measured: Mapping[str, Measurement], bases: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Figure], list[Sample]]:
    """Join the measurements of all systems; ``bases``: what each trained one is held against, others against the first."""
    first = next(iter(measured.values()))
    figures = []
    for place, one in enumerate(first.quantities):
        found = compare({system: measurement.quantities[place] for system, measurement in measured.items()}, bases)
        figures.append(Figure(task, one.name, one.unit, one.n, found.values, one.better, found.intervals, found.changes, found.between))
    samples = [Sample(*key, {system: found.answers[key] for system, found in measured.items()}) for key in first.answers]
    return figures, samples
