"""`finetune sweep`: a grid over overrides, its runs one after the other, one table at the end."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import api
from finetune.cli.options import Json

if TYPE_CHECKING:
    from finetune.config.sweep import Case
    from finetune.sweeping.carry_out import Doing
    from finetune.sweeping.table import Row, Table

_CODES = range(1, 7)
_WIDEST = 3
"""Further figures that 80 columns hold."""


def sweep(
    plan: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML file: the configuration, arms, a grid, the output.")],
    only_list: Annotated[bool, typer.Option("--list", help="Check every run's configuration, list them, and train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train and measure one configuration in many variants; prints the directory with sweep.json and report.html last.

    SWEEP names a configuration, arms (sets of overrides) and a grid (key -> values): each arm is run with each combination.
    Every configuration is checked before the first run. The same command goes on after an interruption.
    A run that diverges or does not fit is told in the table and does not end the others; the exit code is then its own.
    """
    from finetune.cli import view

    planned = api.load_sweep(plan)
    if only_list:
        _list([case for case, _ in planned.cases], as_json=as_json)
        return

    def tell(number: int, of: int, case: Case, doing: Doing) -> None:
        view.note(f"run {number} of {of}, {case.run.name}: {doing}")

    table, page = api.sweep(planned, tell)
    if as_json:
        sys.stdout.write(json.dumps(table.as_dict() | {"report": str(page) if page else None}, indent=2, allow_nan=False) + "\n")
    else:
        _show(table)
        if page:
            view.note(f"curves of all runs: {page}")
        sys.stdout.write(f"{planned.directory}\n")
    failed = [row for row in table.rows if row.failure is not None]
    if failed:
        view.note(f"{len(failed)} of {len(table.rows)} runs have no figures; the exit code is that of the first of them")
        raise typer.Exit(failed[0].code if failed[0].code in _CODES else 1)


def _list(cases: Sequence[Case], *, as_json: bool) -> None:
    """Each run and what it changes, as a shell takes it."""
    if as_json:
        found = [{"run": str(case.run), "arm": case.arm, "settings": dict(case.settings)} for case in cases]
        sys.stdout.write(json.dumps({"runs": found}, indent=2) + "\n")
        return
    for case in cases:
        changes = " ".join(f"-o {shlex.quote(each)}" for each in case.overrides[:-1])
        sys.stdout.write(f"{case.run}  {changes}".rstrip() + "\n")


def _show(table: Table) -> None:
    """A row a run, the best of each arm marked; on stderr."""
    from rich.table import Table as Grid
    from rich.text import Text

    from finetune.cli import view

    columns = table.columns[:_WIDEST]
    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column("run", overflow="fold")
    for name in (table.select, *columns):
        grid.add_column(name, justify="right", overflow="fold")
    for row in table.rows:
        heading = Text(f"{'* ' if row.best else '  '}{row.name}", style="bold" if row.best else "")
        figures = [Text(_value(row, name)) for name in (table.select, *columns)]
        grid.add_row(heading, *(figures if row.failure is None else [Text(row.failure, style="yellow")]))
    view.err.print(grid)
    view.note(f"* the best of its arm by {table.select}; all figures with their intervals: sweep.json")


def _value(row: Row, name: str) -> str:
    """The figure, and how it differs from the model before training."""
    shown = row.figures.get(name)
    if shown is None:
        return "-"
    return f"{shown.value:.3f}" if shown.base is None else f"{shown.value:.3f} ({shown.value - shown.base:+.3f})"
