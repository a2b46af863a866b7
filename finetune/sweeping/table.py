"""What a sweep found: a row a run, and the best run of each arm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.config.figure_names import GENERAL_TEXT, LOSS, SUBSTANCE, VALIDATION_LOSS
from finetune.config.hints import nearest
from finetune.config.sweep import Planned
from finetune.errors import ConfigError
from finetune.runs import RunDirectory
from finetune.sealed import read_json, write_json
from finetune.sweeping.carry_out import Outcome
from finetune.sweeping.measured import own_columns

RECORD = "sweep.json"
"""In the directory of a sweep."""
_LOWER = "lower"


@dataclass(frozen=True, slots=True)
class Shown:
    """A figure of one run."""

    value: float
    """Of the tuned model; of a conclusion, such as substance, the difference itself."""
    base: float | None
    """Of the model before training, on the same items."""
    low: float | None
    """95 % interval of the difference, or of the value where nothing is compared."""
    high: float | None
    better: str
    """``lower``, ``higher``, or ``same`` where no change is wanted."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run."""

    name: str
    arm: str
    settings: Mapping[str, Any]
    run: str
    failure: str | None
    figures: Mapping[str, Shown]
    tokens: int
    """Tokens trained on."""
    seconds: float
    """Of its steps."""
    code: int = 0
    """Exit code of the command that failed."""
    best: bool = False
    """Whether it is the best of its arm by the figure that the sweep names."""


@dataclass(frozen=True, slots=True)
class Table:
    """All runs of a sweep."""

    select: str
    columns: tuple[str, ...]
    """Further figures to show, `select` left out."""
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """For sweep.json and `--json`."""
        return asdict(self)


def write_table(planned: Planned, outcomes: Sequence[Outcome]) -> Table:
    """The table of ``outcomes``, from what the runs left behind; kept in sweep.json."""
    rows = [_row(outcome) for outcome in outcomes]
    select = planned.sweep.select
    columns = tuple(dict.fromkeys(name for name in planned.sweep.columns or _usual(rows) if name != select))
    best = {arm: _best([row for row in rows if row.arm == arm], select) for arm in {row.arm for row in rows}}
    marked = tuple(_marked(row, best[row.arm]) for row in rows)
    table = Table(select, columns, marked)
    planned.directory.mkdir(parents=True, exist_ok=True)
    write_json(planned.directory / RECORD, table.as_dict())
    return table


def _row(outcome: Outcome) -> Row:
    case, run = outcome.case, RunDirectory(outcome.case.run)
    steps = [row for row in _metrics(run) if row["kind"] == "step"]
    figures = dict(_figures(run)) if outcome.failure is None else {}
    tokens, seconds = sum(step["tokens"] for step in steps), sum(step["seconds"] for step in steps)
    return Row(case.run.name, case.arm, dict(case.settings), str(case.run), outcome.failure, figures, tokens, seconds, outcome.code)


def _metrics(run: RunDirectory) -> list[dict[str, Any]]:
    return run.metric_rows() if run.metrics.is_file() else []


def _figures(run: RunDirectory) -> Iterator[tuple[str, Shown]]:
    losses = [row["validation_loss"] for row in _metrics(run) if row["kind"] == "evaluation"]
    if losses:  # the adapter that a run leaves is that of its best evaluation
        yield VALIDATION_LOSS, Shown(min(losses), None, None, None, _LOWER)
    results = run.results
    if not results.is_file():
        return
    found = read_json(results)
    columns = own_columns(run, found)
    if columns is None:
        return
    base, tuned = columns
    for figure in found["figures"]:
        change = figure.get("changes", {}).get(tuned, {})
        yield figure["name"], _shown(figure["values"][tuned], figure["values"][base], change, figure["better"])
    for one in found.get("headlines", ()):
        if one["system"] == tuned:
            name = f"{one['name']}: {one['measure']}"
            yield name, _shown(one["change"]["difference"], None, one["change"], one["better"])


def _shown(value: float, base: float | None, change: Mapping[str, Any], better: str) -> Shown:
    return Shown(value, base, change.get("low"), change.get("high"), better)


def _usual(rows: Sequence[Row]) -> tuple[str, ...]:
    """What is shown where a sweep names nothing: what was learned beyond style, and what was forgotten."""
    known = [name for row in rows for name in row.figures]
    wanted = (f"{SUBSTANCE}: {LOSS}", GENERAL_TEXT)
    return tuple(name for name in wanted if name in known)


def require_figures(planned: Planned, outcome: Outcome) -> None:
    """ConfigError where a run has figures, but not one that the sweep names: the others would not have it either."""
    known = _row(outcome).figures
    for key, name in [("select", planned.sweep.select), *(("columns", name) for name in planned.sweep.columns)]:
        if known and name not in known:
            meant = nearest(name, known)
            fix = f"did you mean {meant!r}?" if meant else f"there are: {', '.join(sorted(known))}"
            raise ConfigError(f"run {outcome.case.run.name} has no figure called {name!r}", where=f"`{key}` of the sweep", fix=fix)


def _best(rows: Sequence[Row], select: str) -> Row | None:
    found = [row for row in rows if select in row.figures]
    if not found:
        return None
    sign = -1.0 if found[0].figures[select].better == "higher" else 1.0
    return min(found, key=lambda row: _last(sign * row.figures[select].value))


def _last(value: float) -> float:
    """What is no number comes last."""
    return value if math.isfinite(value) else math.inf


def _marked(row: Row, best: Row | None) -> Row:
    return Row(**{name: getattr(row, name) for name in Row.__dataclass_fields__} | {"best": row is best})


def finished_runs(table: Table) -> list[Path]:
    """Directories of the runs that have figures, for a page of all of them."""
    return [Path(row.run) for row in table.rows if row.failure is None]
