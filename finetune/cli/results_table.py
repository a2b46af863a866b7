"""The figures of an evaluation as a table: value and interval of every system, change and verdict, within 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.cells import cell_len
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from finetune.reporting.wording import places_that_tell

CAPTION = (
    "± is half of the 95 % interval, ≤ and ≥ are one end of it; "
    "a change is called better or worse only where its interval excludes zero and p < 0.05"
)
_GOOD = {"better": "green", "worse": "red"}
_NOTHING = "no difference"
_CHANGE = ("change", "verdict")
_BESIDE = 14
"""The longest name of a system that can head a column: two of them with their change leave 23 of 80 columns to what was measured."""


def results_table(results: Any) -> Table:
    """Figures of every system. Two stand side by side, their change in columns of its own; more, or longer names, take a line each.

    Changes are from a trained system's own base. Below those of a second trained one stand its changes from the first of them.
    """
    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("measured", overflow="fold")
    systems: Sequence[str] = results.systems
    beside = len(systems) < 3 and max(map(cell_len, systems)) <= _BESIDE
    columns = (*systems, *_CHANGE[: 2 * len(systems) - 2]) if beside else ("value", *_CHANGE)
    for heading in columns:
        table.add_column(heading, justify="left" if heading == _CHANGE[1] else "right", no_wrap=True)
    for heading, members in groupby(results.figures, key=lambda figure: figure.name.partition(": ")[0]):
        figures = list(members)
        counts = dict.fromkeys(figure.n for figure in figures)
        table.add_row(Text(heading, style="bold") + Text(f"  n={', '.join(map(str, counts))}", style="dim"))
        for figure in figures:
            _add_figure(table, figure, systems, results.trained, beside=beside)
    _add_headlines(table, results, len(columns))
    return table


def _add_figure(table: Table, figure: Any, systems: Sequence[str], bases: Mapping[str, str], *, beside: bool) -> None:
    values = [Text(value(figure.values[system], figure.intervals.get(system))) for system in systems]
    changes = [_change(figure, bases.get(system, systems[0]), system) for system in systems[1:]]
    if beside:
        table.add_row(_label(figure), *values, *(part for change in changes for part in change))
        return
    table.add_row(_label(figure))
    first = next((system for system in systems if system in bases), "")
    for system, number, change in zip(systems, values, [(), *changes], strict=True):
        table.add_row(_indented(Text(system), 4), number, *change)
        if system in figure.between:
            table.add_row(
                _indented(Text(f"against {first}", style="dim"), 6),
                "",
                *_said(figure.between[system]),
            )


def _label(figure: Any) -> Padding:
    return _indented(Text(figure.name.partition(": ")[2]) + _unit(figure.unit), 2)


def _indented(text: Text, columns: int) -> Padding:
    """Its further lines too."""
    return Padding(text, (0, 0, 0, columns))


def _unit(unit: str) -> Text:
    """The unit in brackets; a share needs none, and room is short."""
    return Text(f" ({unit})" if unit and unit != "share" else "", style="dim")


def _change(figure: Any, first: str, system: str) -> tuple[Text, Text]:
    """The change and what it says; of results without statistics the bare difference."""
    change = figure.changes.get(system)
    if change is None:
        return Text(f"{figure.values[system] - figure.values[first]:+.3f}"), Text("")
    return _said(change)


def _said(change: Any) -> tuple[Text, Text]:
    word = change.verdict if change.verdict in {*_GOOD, "higher", "lower"} else _NOTHING
    style = _GOOD.get(word, "dim" if word == _NOTHING else "")
    interval = None if change.low is None else (change.low, change.high)
    shown = value(change.difference, interval, sign="+") if word == _NOTHING else told_apart(change.difference, interval)
    return Text(shown, style=style), Text(word, style=style)


def value(number: float, interval: tuple[float, float] | None, sign: str = "") -> str:
    """A number with half of its interval, to the digits that the interval leaves sure; with the far end where it stands at the near one."""
    if interval is None:
        return f"{number:{sign}.3f}"
    low, high = interval
    places = _places(interval)
    if number in interval and low < high:
        mark, end = ("≤", high) if number == low else ("≥", low)
        return f"{number:{sign}.{places}f} {mark}{end:.{places}f}"
    return f"{number:{sign}.{places}f} ±{(high - low) / 2:.{places}f}"


def told_apart(change: float, interval: tuple[float, float] | None) -> str:
    """A change that is told from zero, so that this is seen: not `+0.001 ±0.001`, but as many digits as it takes, and where the interval
    reaches further to the other side than to zero, its end at zero."""
    if interval is None or interval[0] * interval[1] <= 0 or change in interval:
        return value(change, interval, sign="+")
    half = (interval[1] - interval[0]) / 2
    for places in (_places(interval), _places(interval) + 1):
        if round(abs(change), places) > round(half, places):
            return f"{change:+.{places}f} ±{half:.{places}f}"
    places = places_that_tell(*interval, _places(interval))
    mark, end = ("≥", interval[0]) if change > 0 else ("≤", interval[1])
    return f"{change:+.{places}f} {mark}{end:.{places}f}"


def _places(interval: tuple[float, float]) -> int:
    """Decimals that an interval leaves sure."""
    width = interval[1] - interval[0]
    return 3 if width < 0.2 else 2 if width < 20 else 1


def _add_headlines(table: Table, results: Any, columns: int) -> None:
    """What follows from several figures at once, each a change against a system's own base: in the last two of ``columns``."""
    for system, members in groupby(results.headlines, key=lambda one: one.system):
        table.add_row(Text(f"what {system} learned", style="bold"))
        for one in members:
            label = _indented(Text(f"{one.name}, {one.measure}") + _unit(one.unit), 2)
            table.add_row(label, *[""] * (columns - len(_CHANGE)), *_said(one.change))
