"""What a report puts in tables, taken from a run's record: rows of words, ready to be escaped and shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.reporting.record import Record, Row
from finetune.reporting.wording import NOTHING, duration, gibibytes, moment, number, percent, places_that_tell, setting

_WARMING = 2
"""Steps left out of the usual throughput where there are more than twice as many: the first ones compile kernels and read the weights."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the rows of a run add up to; None where there are no rows, or those of an older version without the key."""

    steps: int
    tokens: int
    supervised: int | None
    seconds: float
    tokens_per_second: float | None
    """The median over steps."""
    memory_bytes: int | None
    input_share: float | None
    """Of the time in steps, what was spent waiting for rows."""
    first_loss: float | None
    last_loss: float | None
    best_validation: float | None


def measure(record: Record) -> Measured:
    """The sums and extremes of a run's rows."""
    steps = record.steps
    settled = steps[_WARMING:] if len(steps) > 2 * _WARMING else steps
    rates = [row["tokens"] / row["seconds"] for row in settled if row["seconds"]]
    seconds = sum(row["seconds"] for row in steps)
    waited = _present(steps, "input_seconds")
    return Measured(
        steps=len(steps),
        tokens=sum(row["tokens"] for row in steps),
        supervised=sum(_present(steps, "supervised_tokens")) if _present(steps, "supervised_tokens") else None,
        seconds=seconds,
        tokens_per_second=statistics.median(rates) if rates else None,
        memory_bytes=max(_present(steps, "memory_bytes"), default=None),
        input_share=sum(waited) / seconds if waited and seconds else None,
        first_loss=steps[0]["loss"] if steps else None,
        last_loss=steps[-1]["loss"] if steps else None,
        best_validation=min((row["validation_loss"] for row in record.evaluations), default=None),
    )


def _present(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows if row.get(key) is not None]


def state(record: Record) -> str:
    """How far the run came, in a few words."""
    planned, done = record.plan.get("steps", {}).get("total"), record.steps[-1]["step"] if record.steps else 0
    if record.result is None:
        return f"not finished: {done} of {number(planned)} steps"
    early = ", stopped early" if record.result.get("stopped_early") else ""
    return f"{done} of {number(planned)} steps{early}; the result is that of step {number(record.result.get('step'))}"


def facts(record: Record) -> list[tuple[str, str]]:
    """The run in a few lines."""
    settings, environment, data = record.settings, record.environment, record.plan.get("data", {})
    groups = record.plan.get("groups", ())
    train = data.get("train", {})
    lines = [
        ("state", state(record)),
        ("model", f"{setting(settings.get('model.id'))}, quantization {setting(settings.get('quantization.method', 'none'))}"),
        ("method", _method(settings)),
        ("trainable", f"{number(sum(group['parameters'] for group in groups))} parameters" if groups else NOTHING),
        (
            "data",
            f"{number(train.get('examples'))} rows, {number(train.get('tokens'))} tokens, {number(train.get('supervised'))} supervised",
        ),
        ("machine", str(environment.get("machine", {}).get("name", NOTHING))),
        ("started", moment(environment.get("started"))),
        ("seed", str(environment.get("seed", NOTHING))),
    ]
    return [(name, value) for name, value in lines if value != NOTHING]


def _method(settings: Mapping[str, Any]) -> str:
    named = [str(settings.get("tuning.method", NOTHING))]
    named += [f"{key} {setting(settings[f'tuning.{key}'])}" for key in ("rank", "alpha", "scaling") if f"tuning.{key}" in settings]
    return ", ".join(named)


# --- configuration -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of the configuration."""

    key: str
    value: str
    origin: str


def settings(record: Record) -> tuple[list[Setting], list[Setting]]:
    """The values that somebody stated, and the defaults. Without recorded origins all count as stated."""
    rows = [Setting(key, setting(value), record.origins.get(key, "")) for key, value in record.settings.items()]
    return [row for row in rows if row.origin != "default"], [row for row in rows if row.origin == "default"]


def differing(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Each key that not all runs give the same value, with the value of each; the place of the output aside, which always differs."""
    keys = dict.fromkeys(key for record in records for key in record.settings if key != "output")
    rows = [(key, [setting(one.settings[key]) if key in one.settings else NOTHING for one in records]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


# --- runs side by side ---------------------------------------------------------------------------------------------------------------


def side_by_side(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """What was measured, one column a run."""
    found = [(record, measure(record)) for record in records]
    rows: list[tuple[str, list[str]]] = [
        ("state", [state(record) for record, _ in found]),
        ("first training loss", [number(one.first_loss) for _, one in found]),
        ("last training loss", [number(one.last_loss) for _, one in found]),
        ("best validation loss", [number(one.best_validation) for _, one in found]),
        ("trainable parameters", [number(_trainable(record)) for record, _ in found]),
        ("tokens trained", [number(one.tokens) for _, one in found]),
        ("tokens a second, median", [number(one.tokens_per_second) for _, one in found]),
        ("time in steps", [duration(one.seconds) for _, one in found]),
        ("most memory", [gibibytes(one.memory_bytes) for _, one in found]),
        ("gain kept by the merge", [percent((record.merge or {}).get("parity", {}).get("gain_kept")) for record, _ in found]),
        ("findings of the doctor", [str(len(one.diagnosis.findings)) if one.diagnosis else NOTHING for one, _ in found]),
    ]
    return [(name, values) for name, values in rows if any(value != NOTHING for value in values)]


def _trainable(record: Record) -> int | None:
    return sum(group["parameters"] for group in record.plan["groups"]) if record.plan.get("groups") else None


# --- evaluation ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of one system, with how sure it is and how it compares with its base, or with the first system."""

    value: str
    interval: str = ""
    change: str = ""
    verdict: str = ""
    between: str = ""
    """How it compares with the first trained system."""


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One measured quantity."""

    group: str
    name: str
    unit: str
    n: str
    cells: tuple[Cell, ...]

    @property
    def sure(self) -> bool:
        """Whether a cell says how sure it is."""
        return any(cell.interval or cell.change for cell in self.cells)


def figure_rows(results: Row) -> list[FigureRow]:
    """The figures of one evaluation, one cell a system."""
    return [_figure_row(figure, [(figure, system) for system in results["systems"]]) for figure in results["figures"]]


def compared_figures(records: Sequence[Record]) -> Iterator[tuple[str, list[str], list[FigureRow]]]:
    """For each file of results that several runs have: its name, the columns, and a row for every figure that one of them has."""
    for name in sorted({name for record in records for name in record.results}):
        columns = [(one, system) for one in records if name in one.results for system in one.results[name]["systems"]]
        if len({record.name for record, _ in columns}) < 2:
            continue
        figures = {id(record): {(f["name"], f["unit"]): f for f in record.results[name]["figures"]} for record, _ in columns}
        keys = dict.fromkeys(key for found in figures.values() for key in found)
        rows = []
        for key in keys:
            places = [(figures[id(record)].get(key), system) for record, system in columns]
            rows.append(_figure_row(next(figure for figure, _ in places if figure), places))
        yield name, [f"{record.name}: {system}" for record, system in columns], rows


def _figure_row(figure: Row, places: Sequence[tuple[Row | None, str]]) -> FigureRow:
    group, _, name = figure["name"].rpartition(": ")
    counts = dict.fromkeys(number(one["n"]) for one, _ in places if one)
    cells = tuple(_cell(one, system) if one else Cell(NOTHING) for one, system in places)
    return FigureRow(group or figure.get("task", ""), name, figure["unit"], " / ".join(counts), cells)


def headlines(results: Row) -> list[tuple[str, str]]:
    """Conclusions that rest on several figures: what each is called and what it came to."""
    return [
        (f"{one['name']}, {one['system']}", f"{one['measure']}: {_worded(one['change'])} {one['unit']}; {one['change']['verdict']}")
        for one in results.get("headlines", ())
    ]


def _cell(figure: Row, system: str) -> Cell:
    interval, change = figure.get("intervals", {}).get(system), figure.get("changes", {}).get(system)
    cell = Cell(_fixed(figure["values"].get(system)), f"{_fixed(interval[0])} to {_fixed(interval[1])}" if interval else "")
    if not change:
        return cell
    other = figure.get("between", {}).get(system)
    between = f"{_worded(other)}; {other['verdict']}" if other else ""
    return Cell(cell.value, cell.interval, _worded(change), str(change["verdict"]), between)


def _worded(change: Row) -> str:
    if change.get("low") is None:
        return f"{change['difference']:+.3f}"
    places = places_that_tell(change["low"], change["high"])
    difference, low, high = (f"{change[part]:+.{places}f}" for part in ("difference", "low", "high"))
    return f"{difference} ({low} to {high})"


def _fixed(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


# --- merging and samples -------------------------------------------------------------------------------------------------------------


def merge_rows(merge: Row) -> list[tuple[str, str]]:
    """What a merge proved, in words."""
    parity, fold = merge.get("parity") or {}, merge.get("fold") or {}
    rows = [
        ("written in", f"{merge.get('dtype', NOTHING)}: {merge.get('reason', NOTHING)}"),
        ("onto", str(merge.get("why_base") or merge.get("base", NOTHING))),
        ("tensors updated", f"{number(fold.get('updated'))} of {number(fold.get('tensors'))}" if fold else NOTHING),
        ("size", gibibytes(fold.get("size"))),
        ("positions compared after reloading", number(parity.get("positions"))),
        ("same first choice", percent(parity.get("argmax_agreement"))),
        ("mean KL divergence", number(parity.get("mean_kl"))),
        ("largest difference of a logit", number(parity.get("max_logit_difference"))),
        ("loss: base, adapter, merged", ", ".join(number(parity.get(f"loss_{name}"), 4) for name in ("base", "adapter", "merged"))),
        ("gain kept", percent(parity.get("gain_kept"))),
    ]
    return [(name, value) for name, value in rows if value.strip(f"{NOTHING}, ")]


def samples_by_prompt(record: Record) -> dict[str, list[tuple[int, str]]]:
    """Prompt -> (step, answer) in the order of the steps."""
    found: dict[str, list[tuple[int, str]]] = {}
    for row in record.samples:
        for sample in row["samples"]:
            found.setdefault(sample["prompt"], []).append((row["step"], sample["text"]))
    return found
