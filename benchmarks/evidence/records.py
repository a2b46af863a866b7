"""What is kept of each run: one JSON file beside the page, from which every number on it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.dump import leaves
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.config.sweep import Case, Planned
from finetune.config.tree import dotted
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.conclusions import ASKED, BINDING, CONTROL, GAP, HEADLINES, READ, STYLE, SUBSTANCE, TRAINED, contrasts
from finetune.evaluation.items import as_items, from_items, read_items
from finetune.evaluation.knowledge import LABELS
from finetune.evaluation.statistics import Quantity, Sampled, sampled_change
from finetune.runs import RunDirectory
from finetune.sealed import write_text

_NORMAL = 1.959964
"""Standard errors in half of a 95 % interval."""

FIGURES = {
    "learned": f"{SUBSTANCE}: {BINDING}",
    "learned, by loss": f"{SUBSTANCE}: answer loss",
    "learned, by choice": f"{SUBSTANCE}: choice of four, titles of the arm",
    "style": f"{STYLE}: answer loss",
    "control": f"{STYLE}: {BINDING}",
    "control, by choice": f"{STYLE}: choice of four, titles of the arm",
    "memory": f"{TRAINED}, {LABELS['memory']}: {BINDING}",
    "gap": f"{GAP}: {BINDING}",
    "forgotten": "general text: loss",
}
"""Column of the page -> what `finetune eval` calls it. All are changes from the run's own base. The page's efficiency is made from two of
them: that of `finetune eval` is by answer loss, which shuffled answers lower too."""
_KEPT = {
    FIGURES["memory"],
    FIGURES["forgotten"],
    *(f"{arm}: {measure}" for arm in (TRAINED, ASKED, READ, CONTROL) for measure in HEADLINES),
}
"""Figures whose sums by fact are kept, which pair one run with another."""
_ITS_OWN = 99
"""Group of the figures that are no contrast: of one figure the draws are the same in every run."""


@dataclass(frozen=True, slots=True)
class Number:
    """A change from the base, or the difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float
    sampled: Sampled | None = field(default=None, compare=False, repr=False)
    """Its resamples; None where what it was summed from is not kept."""

    @property
    def error(self) -> float:
        """The standard error that the width of the interval stands for."""
        return (self.high - self.low) / (2 * _NORMAL)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on that side of zero, else 0."""
        return (self.low > 0) - (self.high < 0)

    @property
    def p(self) -> float | None:
        """Two-sided, from the resamples; None without them."""
        return None if self.sampled is None else self.sampled.p

    def less(self, other: Number) -> Number:
        """The difference: paired, the same facts drawn for both, where what the two were summed from is kept.

        Without that, as if they had been measured on different facts, which makes the interval too wide rather than too narrow.
        """
        if self.sampled is not None and other.sampled is not None:
            paired = self.sampled - other.sampled
            if paired.interval is not None:
                return Number(paired.value, *paired.interval, paired)
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


def copy(planned: Planned, failures: Mapping[str, str | None], folder: Path) -> None:
    """Write what every run of ``planned`` left behind into ``folder``, a file each; files of runs that it does not plan are removed.

    ``failures``: why runs have no figures, by name. A run that is not measured yet leaves the file that is there as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for case, loaded in planned.cases:
        failure = failures.get(case.run.name)
        if failure is not None or RunDirectory(case.run).results.is_file():
            text = json.dumps(_record(case, loaded.config, failure), indent=1, allow_nan=False)
            write_text(folder / f"{case.run.name}.json", text + "\n")
    for path in set(folder.glob("*.json")) - {folder / f"{case.run.name}.json" for case, _ in planned.cases}:
        path.unlink()


def _record(case: Case, config: Config, failure: str | None) -> dict[str, Any]:
    run = RunDirectory(case.run)
    made_of = configured(config if failure is not None else load_config(run.config).config)
    found: dict[str, Any] = {"name": case.run.name, "arm": case.arm, "config": made_of, "failure": failure}
    if failure is not None:
        return found
    steps = [row for row in run.metric_rows() if row["kind"] == "step"]
    made = json.loads(run.environment.read_text(encoding="utf-8"))
    measured = json.loads(run.results.read_text(encoding="utf-8"))
    kept = {key: measured[key] for key in ("systems", "figures", "headlines", "notes")}
    items = {task: {name: _only_kept(one) for name, one in systems.items()} for task, systems in read_items(run.results).items()}
    kept |= {"questions": measured["record"]["questions"], "items": as_items({task: one for task, one in items.items() if any(_asks(one))})}
    # Not `machine` and `record` whole: they name directories and systems that say nothing about the figures.
    machine = {key: made["machine"][key] for key in ("kind", "name", "bf16")}
    training = {
        "tokens": sum(step["tokens"] for step in steps),
        "step_seconds": sum(step["seconds"] for step in steps),
        "evaluation_seconds": measured["seconds"],
    }
    return {**found, "machine": machine, "versions": made["versions"], "training": training, **kept}


def configured(config: Config) -> dict[str, Any]:
    """Every value of a run's configuration by its key, but for where it lies."""
    return {dotted(path): value for path, value in leaves(config).items() if path != ("output",)}


def _asks(systems: Mapping[str, Measurement]) -> list[Quantity]:
    return [one for measurement in systems.values() for one in measurement.quantities]


def _only_kept(measurement: Measurement) -> Measurement:
    return Measurement(tuple(one for one in measurement.quantities if one.name in _KEPT))


def read(planned: Planned, folder: Path) -> tuple[Run, ...]:
    """Every run of ``planned`` with what ``folder`` holds of it."""
    asked: dict[str, Any] = {}
    return tuple(_run(case, loaded.config, folder / f"{case.run.name}.json", asked) for case, loaded in planned.cases)


def _run(case: Case, config: Config, path: Path, asked: dict[str, Any]) -> Run:
    """``asked``: what the first run that was measured was asked; filled by it."""
    if not path.is_file():
        return Run(case, {}, None, "not measured")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["config"] != json.loads(json.dumps(configured(config))):
        return Run(case, {}, None, "not measured: its file is of a run with other settings")
    if found["failure"]:
        return Run(case, {}, None, found["failure"])
    if asked.setdefault("questions", found["questions"]) != found["questions"]:
        return Run(case, {}, None, "not measured: its file is of a run that was asked about other facts")
    base, tuned = found["systems"][:2]
    changes, sampled = dict(_changes(found, tuned)), _sampled(found, base, tuned)
    numbers = {column: number for column, name in FIGURES.items() if (number := _number(changes.get(name), sampled.get(column)))}
    if "learned" in numbers and "forgotten" in numbers and numbers["forgotten"].sign > 0:  # else it would be a ratio to zero
        numbers["efficiency"] = numbers["learned"].over(numbers["forgotten"]).times(0.01)
    general = next((figure["values"][base] for figure in found["figures"] if figure["name"] == FIGURES["forgotten"]), None)
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("finetune", "torch", "peft") if name in found["versions"])
    training = found["training"]
    seconds = training["step_seconds"] + training["evaluation_seconds"]
    return Run(case, numbers, general, "", training["tokens"], seconds, f"{found['machine']['name']}; {versions}")


def _sampled(found: Mapping[str, Any], base: str, tuned: str) -> dict[str, Sampled]:
    """Column -> its resamples, drawn from the facts in the same way for every run."""
    numbers: dict[str, Sampled] = {}
    for systems in from_items(found["items"]).values():
        before, after = systems[base], systems[tuned]
        changes = {f"{name}: {one}": number for one in HEADLINES for name, number in contrasts(one, before, after).items()}
        for quantity in before.quantities:
            later = after.named(quantity.name)
            if later is not None:
                changes[quantity.name] = sampled_change(quantity, later, _ITS_OWN)
        numbers |= {column: changes[name] for column, name in FIGURES.items() if name in changes}
    return numbers


def _changes(found: Mapping[str, Any], tuned: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for figure in found["figures"]:
        if tuned in figure["changes"]:
            yield figure["name"], figure["changes"][tuned]
    for one in found["headlines"]:
        if one["system"] == tuned:
            yield f"{one['name']}: {one['measure']}", one["change"]


def _number(change: Mapping[str, Any] | None, sampled: Sampled | None) -> Number | None:
    """None where nothing was measured, or on too few facts for an interval."""
    if change is None or change["low"] is None:
        return None
    return Number(change["difference"], change["low"], change["high"], sampled)
