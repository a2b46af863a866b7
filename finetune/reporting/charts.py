"""The curves of one or several runs, as numbers: `html` and `png` draw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from finetune.reporting.record import Record, Row

MAX_STEPS = 2000
"""Drawn of a run: a phone draws them at once, and a line of 700 pixels shows no more."""
GIB = 2**30

Values = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: a value, or None, at each position of its run."""

    run: int
    """Index of the run."""
    name: str
    values: Values
    dots: bool = False
    """Whether it has a few values that are drawn as dots on the line."""
    planned: bool = False
    """Whether it is what was planned and not what was measured."""
    means: Values = ()
    """The running mean over all steps, drawn or not, at the same positions; empty where single values say enough."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Series that share a unit."""

    name: str
    """A word, for file names."""
    title: str
    unit: str
    series: tuple[Series, ...]


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the values of a run stand, by each quantity that an x axis can show."""

    step: tuple[int, ...]
    epoch: tuple[float, ...]
    tokens: tuple[int, ...]
    """Trained so far."""
    minutes: tuple[float, ...]
    """Spent in optimizer steps so far."""


@dataclass(frozen=True, slots=True)
class Curves:
    """All charts of a report."""

    runs: tuple[str, ...]
    positions: tuple[Positions, ...]
    """By run."""
    charts: tuple[Chart, ...]
    """Those that have something to draw."""
    thinned: tuple[str, ...]
    """Runs of which not every step is drawn."""

    def as_dict(self) -> dict[str, Any]:
        """For the page: numbers that are not finite are None, and none has more than seven digits, which is more than a pixel shows."""
        axes = [{name: _short(getattr(one, name)) for name in Positions.__slots__} for one in self.positions]
        charts = [
            {
                "title": chart.title,
                "unit": chart.unit,
                "series": [asdict(one) | {"values": _short(one.values), "means": _short(one.means)} for one in chart.series],
            }
            for chart in self.charts
        ]
        return {"runs": list(self.runs), "axes": axes, "charts": charts}


def curves(records: Sequence[Record], planned: Sequence[Mapping[str, float]]) -> Curves:
    """The charts of ``records``. ``planned`` by run may hold `tokens_per_second` and `memory_bytes`, drawn beside what was measured."""
    drawn = [_Drawn(number, record, plan) for number, (record, plan) in enumerate(zip(records, planned, strict=True))]
    charts = [chart for chart in _charts(drawn) if chart.series]
    thinned = tuple(one.record.name for one in drawn if len(one.steps) < len(one.record.steps))
    return Curves(tuple(one.name for one in records), tuple(one.positions for one in drawn), tuple(charts), thinned)


def _charts(drawn: Sequence[_Drawn]) -> Iterator[Chart]:
    def join(*parts: Callable[[_Drawn], Iterator[Series]]) -> tuple[Series, ...]:
        return tuple(series for one in drawn for part in parts for series in part(one))

    def of(name: str, value: Callable[[Row], Any]) -> Callable[[_Drawn], Iterator[Series]]:
        return lambda one: one.by_step(name, value, averaged=True)

    losses = join(of("training", lambda row: row["loss"]), lambda one: one.by_evaluation("validation", "validation_loss"))
    yield Chart("loss", "Loss", "nats a supervised token", losses)
    yield Chart("learning-rate", "Learning rate by group", "", join(lambda one: one.rates()))
    yield Chart("gradient-norm", "Gradient norm", "before clipping", join(of("gradient norm", lambda row: row.get("grad_norm"))))
    speed = join(of("tokens/s", _throughput), lambda one: one.constant("plan", "tokens_per_second"))
    yield Chart("throughput", "Throughput", "tokens a second", speed)
    memory = join(
        lambda one: one.by_step("most so far", lambda row: _scaled(row, "memory_bytes", GIB)),
        lambda one: one.constant("plan", "memory_bytes", GIB),
    )
    yield Chart("memory", "Memory of a process", "GiB", memory)
    waited = join(of("waited", lambda row: _scaled(row, "input_seconds", row["seconds"] / 100)))
    yield Chart("input", "Waiting for rows", "% of a step", waited)


class _Drawn:
    """A run with the steps that are drawn of it, and the series that can be made of them."""

    def __init__(self, number: int, record: Record, planned: Mapping[str, float]) -> None:
        self.number, self.record, self.planned = number, record, planned
        self.steps = _thinned(record.steps)
        self._evaluated = {row["step"]: row for row in record.evaluations}
        self._stepped = {row["step"]: row for row in self.steps}
        self._at = sorted(self._stepped.keys() | self._evaluated.keys())
        self.positions = self._positions()

    def by_step(self, name: str, value: Callable[[Row], Any], *, averaged: bool = False) -> Iterator[Series]:
        values = tuple(_finite(value(self._stepped[step])) if step in self._stepped else None for step in self._at)
        means = _running([(row["step"], _finite(value(row))) for row in self.record.steps]) if averaged else {}
        taken = tuple(means.get(step) if step in self._stepped else None for step in self._at) if means else ()
        yield from self._some(Series(self.number, name, values, means=taken))

    def by_evaluation(self, name: str, key: str) -> Iterator[Series]:
        values = tuple(_finite(self._evaluated[step][key]) if step in self._evaluated else None for step in self._at)
        yield from self._some(Series(self.number, name, values, dots=len(self._evaluated) <= 60))

    def rates(self) -> Iterator[Series]:
        for name in dict.fromkeys(name for row in self.steps for name in row["learning_rates"]):
            yield from self.by_step(name, partial(_rate, name))

    def constant(self, name: str, key: str, unit: float = 1) -> Iterator[Series]:
        if key in self.planned and self._at:
            yield Series(self.number, name, (self.planned[key] / unit,) * len(self._at), planned=True)

    @staticmethod
    def _some(series: Series) -> Iterator[Series]:
        if any(value is not None for value in series.values):
            yield series

    def _positions(self) -> Positions:
        rows = self.record.steps
        tokens = dict(zip((row["step"] for row in rows), accumulate(row["tokens"] for row in rows), strict=True))
        seconds = dict(zip((row["step"] for row in rows), accumulate(row["seconds"] for row in rows), strict=True))
        epochs = {row["step"]: row["epoch"] for row in rows}
        # an evaluation before the first step, or one whose step is not in the file, stands at the start
        return Positions(
            step=tuple(self._at),
            epoch=tuple(epochs.get(step, 0.0) for step in self._at),
            tokens=tuple(tokens.get(step, 0) for step in self._at),
            minutes=tuple(seconds.get(step, 0.0) / 60 for step in self._at),
        )


def _thinned(rows: Sequence[Row]) -> list[Row]:
    """At most about `MAX_STEPS` of ``rows``: of equal stretches the step with the lowest and the one with the highest loss, so that no
    spike is lost; and the first and the last."""
    if len(rows) <= MAX_STEPS:
        return list(rows)
    length = math.ceil(2 * len(rows) / MAX_STEPS)
    kept = {0, len(rows) - 1}
    for start in range(0, len(rows), length):
        stretch = range(start, min(start + length, len(rows)))
        kept |= {min(stretch, key=lambda at: rows[at]["loss"]), max(stretch, key=lambda at: rows[at]["loss"])}
    return [rows[at] for at in sorted(kept)]


def _running(values: Sequence[tuple[int, float | None]]) -> dict[int, float]:
    """The mean of the last values at each step, as many as a thirtieth of the run: steps differ more by their rows than by what was
    learned between them."""
    present = [(step, value) for step, value in values if value is not None]
    sums = [0.0, *accumulate(value for _, value in present)]
    width = max(3, math.ceil(len(present) / 30))
    starts = (max(0, end - width) for end in range(1, len(present) + 1))
    return {step: (sums[end] - sums[start]) / (end - start) for end, (start, (step, _)) in enumerate(zip(starts, present, strict=True), 1)}


def _rate(group: str, row: Row) -> Any:
    return row["learning_rates"].get(group)


def _throughput(row: Row) -> float | None:
    return row["tokens"] / row["seconds"] if row["seconds"] else None


def _scaled(row: Row, key: str, unit: float) -> float | None:
    return row[key] / unit if row.get(key) is not None and unit else None


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _short(values: Sequence[float | None]) -> list[float | None]:
    return [value if value is None or isinstance(value, int) else float(f"{value:.7g}") for value in values]
