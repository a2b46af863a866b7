"""The curves of a report as PNG files for papers, drawn by matplotlib, which is an optional part."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ConfigError, HardwareError
from finetune.reporting.charts import Chart, Curves, Positions, curves
from finetune.reporting.planned import expected
from finetune.reporting.record import read_records
from finetune.runs import RunDirectory
from finetune.sealed import replaced, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 6.4, 3.6, 200
"""Inches, and dots an inch: a column of a paper, sharp in print."""
_DASHES = ("-", "--", ":", "-.")


def require_png(directory: Path) -> None:
    """HardwareError where matplotlib is missing, ConfigError where ``directory`` is a file or its parent is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise HardwareError("matplotlib is not installed", where=f"--png {directory}", fix="pip install 'finetune[png]'")
    if (directory.exists() and not directory.is_dir()) or not directory.absolute().parent.is_dir():
        raise ConfigError(
            "the directory of the pictures cannot be made", where=f"--png {directory}", fix="name one in a directory that exists"
        )


def write_png(runs: Sequence[RunDirectory], directory: Path) -> list[Path]:
    """Write each chart of ``runs`` as DIRECTORY/NAME.png, those of all runs overlaid; returns the paths."""
    require_png(directory)
    records = read_records(runs)
    drawn = curves(records, [expected(record) for record in records])
    with writing(directory):
        directory.mkdir(exist_ok=True)
    paths = []
    for chart in drawn.charts:
        path = directory / f"{chart.name}.png"
        with replaced(path) as temporary:
            _draw(chart, drawn).savefig(temporary, format="png", dpi=DPI)
        paths.append(path)
    return paths


def _draw(chart: Chart, drawn: Curves) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    within: dict[int, int] = {}
    several = len(drawn.runs) > 1
    for number, series in enumerate(chart.series):
        order = within[series.run] = within.get(series.run, -1) + 1
        across, values = _present(drawn.positions[series.run], series.values)
        axes.plot(
            across,
            values,
            color=f"C{(series.run if several else number) % 10}",
            linestyle=":" if series.planned else _DASHES[order % len(_DASHES) if several else 0],
            linewidth=1.2,
            marker="o" if series.dots else "",
            markersize=4,
            # a name that begins with an underscore would be left out of the legend
            label=f" {drawn.runs[series.run]}: {series.name}" if several else f" {series.name}",
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"{chart.title}\n{chart.unit}" if chart.unit else chart.title)
    axes.grid(visible=True, linewidth=0.4)
    for text in axes.legend(frameon=False, fontsize="small").get_texts():
        text.set_parse_math(False)  # a dollar in the name of a run is a dollar
    return figure


def _present(positions: Positions, values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """Steps and values, without the positions that have none: they would break the line."""
    pairs = [(step, value) for step, value in zip(positions.step, values, strict=True) if value is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]
