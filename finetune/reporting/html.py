"""One self-contained HTML page of one or several runs. It opens from disk, loads nothing, and what models and data say in it is text.

The page holds two scripts, uPlot and `page.js`, and the policy in its head allows these two by their hashes and forbids every request and
any other script. Text is escaped by Jinja; numbers of the curves go into a JSON block in which `<` is written as `\\u003c`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from finetune import __version__
from finetune.errors import ConfigError
from finetune.reporting.charts import Curves, curves
from finetune.reporting.planned import Planned, expected, memory_parts, plan_rows
from finetune.reporting.record import Record, Row, read_records
from finetune.reporting.tables import (
    FigureRow,
    Setting,
    compared_figures,
    differing,
    facts,
    figure_rows,
    headlines,
    merge_rows,
    samples_by_prompt,
    settings,
    side_by_side,
)
from finetune.reporting.wording import figure, moment, setting
from finetune.runs import RunDirectory
from finetune.sealed import write_text


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One file of results, as it is shown."""

    name: str
    systems: tuple[str, ...]
    rows: tuple[FigureRow, ...]
    notes: tuple[str, ...]
    samples: tuple[Row, ...]
    headlines: list[tuple[str, str]]
    record: str
    """What is needed to measure it again, as JSON; empty where it was not kept."""


@dataclass(frozen=True, slots=True)
class RunPage:
    """What the template shows of one run."""

    name: str
    anchor: str
    """Before the ids of its sections, so that those of several runs differ."""
    record: Record
    facts: list[tuple[str, str]]
    evaluations: list[Evaluation]
    samples: dict[str, list[tuple[int, str]]]
    merge: list[tuple[str, str]]
    planned: list[Planned]
    parts: list[tuple[str, str]]
    groups: Sequence[Row]
    decided: Mapping[str, Row]
    stated: list[Setting]
    defaults: list[Setting]
    environment: list[tuple[str, str]]
    sessions: Sequence[Row]


def write_report(runs: Sequence[RunDirectory], page: Path | None = None) -> Path:
    """Write the page of ``runs`` from their files alone and return its path: ``page``, or report.html in the run where there is one.

    ConfigError for several runs without ``page``, for a run named twice, and where the directory of ``page`` is missing.
    """
    path = page or (runs[0].report if len(runs) == 1 else None)
    if path is None:
        raise ConfigError("it is not said where the page of several runs goes", where="finetune report", fix="-O comparison.html")
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is named twice", where=f"finetune report {' '.join(str(run.path) for run in runs)}", fix="name it once")
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "a directory lies there" if path.is_dir() else "the directory of the page does not exist"
        raise ConfigError(what, where=f"-O {path}", fix="name an .html file in a directory that exists")
    write_text(path, render(read_records(runs)))
    return path


def render(records: Sequence[Record]) -> str:
    """The page of ``records``."""
    drawn = curves(records, [expected(record) for record in records])
    style = _asset("uplot/uPlot.min.css") + _asset("page.css")
    library, script = _asset("uplot/uPlot.iife.min.js"), _asset("page.js")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(_asset), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "moment": moment, "setting": setting, "quoted": lambda text: shlex.quote(str(text))}
    return environment.get_template("report.html.j2").render(
        title=_title(records),
        version=__version__,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        policy=_policy(style, library, script),
        style=style,
        library=library,
        script=script,
        data=_block(drawn),
        curves=drawn.charts,
        thinned=drawn.thinned,
        runs=[_page(record, "" if len(records) == 1 else f"run-{number}-") for number, record in enumerate(records, start=1)],
        measured=side_by_side(records),
        differing=differing(records),
        figures=list(compared_figures(records)),
    )


def _title(records: Sequence[Record]) -> str:
    names = [record.name for record in records]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _page(record: Record, anchor: str) -> RunPage:
    stated, defaults = settings(record)
    return RunPage(
        name=record.name,
        anchor=anchor,
        record=record,
        facts=facts(record),
        evaluations=[_evaluation(name, found) for name, found in record.results.items()],
        samples=samples_by_prompt(record),
        merge=merge_rows(record.merge) if record.merge else [],
        planned=plan_rows(record),
        parts=memory_parts(record),
        groups=record.plan.get("groups", ()),
        decided=record.plan.get("resolved", {}),
        stated=stated,
        defaults=defaults,
        environment=_environment(record.environment),
        sessions=record.environment.get("sessions", ()),
    )


def _evaluation(name: str, found: Row) -> Evaluation:
    rows, notes = tuple(figure_rows(found)), tuple(found.get("notes", ()))
    record = json.dumps(found["record"], indent=2, ensure_ascii=False) if found.get("record") else ""
    return Evaluation(name, tuple(found["systems"]), rows, notes, tuple(found["samples"]), headlines(found), record)


def _environment(environment: Row) -> list[tuple[str, str]]:
    machine = environment.get("machine", {})
    rows = {"machine": machine.get("name"), "devices": machine.get("devices"), "system": environment.get("system")}
    rows |= environment.get("versions", {}) | {"run": environment.get("run_id")}
    prints: Mapping[str, Any] = environment.get("identity", {}).get("fingerprints", {})
    rows |= {f"fingerprint of {name}": value for name, value in prints.items()}
    return [(name, str(value)) for name, value in rows.items() if value is not None]


# --- what the page may do ------------------------------------------------------------------------------------------------------------


def _asset(name: str) -> str:
    return resources.files("finetune.reporting").joinpath(name).read_text(encoding="utf-8")


def _block(drawn: Curves) -> str:
    """The numbers and names of the curves as JSON that no tag can end: inside a script element only `<` matters, and none is left."""
    text = json.dumps(drawn.as_dict(), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(style: str, *scripts: str) -> str:
    """Of the page's head: this style sheet and these scripts, and nothing else; no request goes anywhere."""
    allowed = " ".join(map(_hash, scripts))
    return f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
