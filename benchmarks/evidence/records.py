"""What is kept of each run: one JSON file beside the page, from which every number on it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.sweep import Case, Planned
from finetune.evaluation.conclusions import BINDING, TRAINED
from finetune.evaluation.knowledge import LABELS
from finetune.runs import RunDirectory
from finetune.sweeping.table import Row, Table

_NORMAL = 1.959964
"""Standard errors in half of a 95 % interval."""

FIGURES = {
    "learned": f"substance: {BINDING}",
    "learned, by loss": "substance: answer loss",
    "learned, by choice": "substance: choice of four, titles of the arm",
    "style": "style: answer loss",
    "memory": f"{TRAINED}, {LABELS['memory']}: {BINDING}",
    "gap": f"extraction gap: {BINDING}",
    "forgotten": "general text: loss",
}
"""Column of the page -> what `finetune eval` calls it. All are changes from the run's own base. The page's efficiency is made from two of
them: that of `finetune eval` is by answer loss, which shuffled answers lower too."""


@dataclass(frozen=True, slots=True)
class Number:
    """A change from the base, or the difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """The standard error that the width of the interval stands for."""
        return (self.high - self.low) / (2 * _NORMAL)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on that side of zero, else 0."""
        return (self.low > 0) - (self.high < 0)

    def less(self, other: Number) -> Number:
        """The difference as if the two had been measured on different items.

        They were measured on the same ones, which are kept with neither, so the interval is too wide rather than too narrow.
        """
        half = _NORMAL * math.hypot(self.error, other.error)
        return Number(self.value - other.value, self.value - other.value - half, self.value - other.value + half)

    def over(self, other: Number) -> Number:
        """The ratio to another that is measured on other items and is not zero, its interval by the delta method."""
        value = self.value / other.value
        half = _NORMAL * math.hypot(self.error, value * other.error) / abs(other.value)
        return Number(value, value - half, value + half)

    def times(self, factor: float) -> Number:
        """The same in another unit."""
        return Number(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the sweep; without numbers where it was not measured."""

    case: Case
    numbers: Mapping[str, Number]
    """By column."""
    base_loss: float | None
    """Of its own base on general text."""
    why_not: str
    """Why there are no numbers; empty where there are."""
    tokens: int = 0
    seconds: float = 0.0
    made_with: str = ""
    """Machine and versions."""

    @property
    def rate(self) -> float:
        """The learning rate that the sweep varies."""
        return float(self.case.settings["optimizer.learning_rate"])


def copy(planned: Planned, table: Table, folder: Path) -> None:
    """Write what every run of ``table`` left behind into ``folder``, a file each; files of other runs are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for (case, _), row in zip(planned.cases, table.rows, strict=True):
        text = json.dumps(_record(case, row), indent=1, allow_nan=False)
        (folder / f"{row.name}.json").write_text(text + "\n", encoding="utf-8")
    for path in set(folder.glob("*.json")) - {folder / f"{row.name}.json" for row in table.rows}:
        path.unlink()


def _record(case: Case, row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"name": row.name, "arm": row.arm, "settings": dict(case.settings), "failure": row.failure}
    if row.failure is not None:
        return found
    run = RunDirectory(case.run)
    made = json.loads(run.environment.read_text(encoding="utf-8"))
    measured = json.loads((run.evaluations / "results.json").read_text(encoding="utf-8"))
    kept = {key: measured[key] for key in ("systems", "figures", "headlines", "notes")}
    # Not `machine` and `record` whole: they name directories and systems that say nothing about the figures.
    machine = {key: made["machine"][key] for key in ("kind", "name", "bf16")}
    training = {"tokens": row.tokens, "step_seconds": row.seconds, "evaluation_seconds": measured["seconds"]}
    return {**found, "machine": machine, "versions": made["versions"], "training": training, **kept}


def read(cases: Sequence[Case], folder: Path) -> tuple[Run, ...]:
    """Every run of ``cases`` with what ``folder`` holds of it."""
    return tuple(_run(case, folder / f"{case.run.name}.json") for case in cases)


def _run(case: Case, path: Path) -> Run:
    if not path.is_file():
        return Run(case, {}, None, "not measured")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != json.loads(json.dumps(dict(case.settings))):
        return Run(case, {}, None, "not measured: its file is of a run with other settings")
    if found["failure"]:
        return Run(case, {}, None, found["failure"])
    base, tuned = found["systems"][:2]
    changes = dict(_changes(found, tuned))
    numbers = {column: number for column, name in FIGURES.items() if (number := _number(changes.get(name)))}
    if "learned" in numbers and "forgotten" in numbers and numbers["forgotten"].sign > 0:  # else it would be a ratio to zero
        numbers["efficiency"] = numbers["learned"].over(numbers["forgotten"]).times(0.01)
    general = next((figure["values"][base] for figure in found["figures"] if figure["name"] == FIGURES["forgotten"]), None)
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("finetune", "torch", "peft") if name in found["versions"])
    training = found["training"]
    seconds = training["step_seconds"] + training["evaluation_seconds"]
    return Run(case, numbers, general, "", training["tokens"], seconds, f"{found['machine']['name']}; {versions}")


def _changes(found: Mapping[str, Any], tuned: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for figure in found["figures"]:
        if tuned in figure["changes"]:
            yield figure["name"], figure["changes"][tuned]
    for one in found["headlines"]:
        if one["system"] == tuned:
            yield f"{one['name']}: {one['measure']}", one["change"]


def _number(change: Mapping[str, Any] | None) -> Number | None:
    """None where nothing was measured, or on too few facts for an interval."""
    if change is None or change["low"] is None:
        return None
    return Number(change["difference"], change["low"], change["high"])
