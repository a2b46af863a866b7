"""What a report tells of one run, read from its files alone; what is not there yet is None or empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.origins import stored_leaves
from finetune.errors import VerificationError
from finetune.reporting.doctor.diagnosis import FILE as DIAGNOSIS
from finetune.reporting.doctor.diagnosis import read_diagnosis
from finetune.reporting.doctor.findings import Diagnosis
from finetune.runs import FIGURES, RunDirectory
from finetune.sealed import read_json

Row = Mapping[str, Any]

_NEEDED: dict[str, tuple[str, ...]] = {
    "step": ("step", "epoch", "loss", "learning_rates", "tokens", "seconds"),
    "evaluation": ("step", "validation_loss"),
    "sample": ("step", "samples"),
}
"""Keys of a row of metrics.jsonl that every version wrote."""


@dataclass(frozen=True, slots=True)
class Record:
    """A run as its files tell it."""

    name: str
    """Of its directory, made unique among the runs of one report."""
    path: Path
    steps: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    samples: tuple[Row, ...]
    """Answers taken while it trained: step, and pairs of prompt and text."""
    config: str
    """The text of config.yaml."""
    settings: Mapping[str, Any]
    """Its values by dotted path."""
    origins: Mapping[str, str]
    """Of these values; empty where the run did not record them."""
    environment: Row
    plan: Row
    results: Mapping[str, Row]
    """What `finetune eval` found, by the name of its file."""
    merge: Row | None
    diagnosis: Diagnosis | None
    result: Row | None
    """Figures of the sealed adapter or model: step and losses; None while there is none."""
    diagnosed_before: str
    """What the run has that its diagnosis did not see; empty where it saw all, or there is none."""


def read_records(runs: Sequence[RunDirectory]) -> list[Record]:
    """Each run with a name of its own; VerificationError where a file is damaged."""
    names = _unique([run.path for run in runs])
    return [_read(run, name) for run, name in zip(runs, names, strict=True)]


def _read(run: RunDirectory, name: str) -> Record:
    rows = {kind: tuple(found) for kind, found in _rows(run).items()}
    diagnosis = read_diagnosis(run)
    environment = read_json(run.environment)
    return Record(
        name=name,
        path=run.path,
        steps=rows["step"],
        evaluations=rows["evaluation"],
        samples=rows["sample"],
        config=run.config.read_text(encoding="utf-8"),
        settings=stored_leaves(run.config),
        origins={key: entry["origin"] for key, entry in environment.get("origins", {}).items()},
        environment=environment,
        plan=_optional(run.plan) or {},
        results={path.stem: _results(path) for path in sorted(run.evaluations.glob("*.json"))},
        merge=_optional(run.path / "merge.json"),
        diagnosis=diagnosis,
        result=_optional(run.adapter / FIGURES) or _optional(run.model / FIGURES),
        diagnosed_before=_unseen(run, diagnosis, rows["step"]) if diagnosis else "",
    )


def _unseen(run: RunDirectory, diagnosis: Diagnosis, steps: Sequence[Row]) -> str:
    last = steps[-1]["step"] if steps else 0
    if last != diagnosis.steps:
        return f"step {last:,}: it saw {diagnosis.steps:,} steps"
    if run.results.is_file() and run.results.stat().st_mtime > (run.path / DIAGNOSIS).stat().st_mtime:
        return "the last evaluation"
    return ""


def _rows(run: RunDirectory) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {kind: [] for kind in _NEEDED}
    for number, row in enumerate(run.metric_rows(), start=1):
        kind = str(row.get("kind")) if isinstance(row, dict) else ""
        missing = [key for key in _NEEDED[kind] if key not in row] if kind in _NEEDED else [f"a kind that is one of {', '.join(_NEEDED)}"]
        if missing:
            fix = "take the row out, or restore the file from a copy"
            raise VerificationError(f"row {number} lacks {', '.join(missing)}", where=str(run.metrics), fix=fix)
        found[kind].append(row)
    return found


def _results(path: Path) -> Row:
    found = read_json(path)
    missing = [key for key in ("systems", "figures", "samples") if key not in found]
    if missing:
        fix = "run `finetune eval` again"
        raise VerificationError(f"the stored results are damaged: no {', '.join(missing)}", where=str(path), fix=fix)
    return found


def _optional(path: Path) -> Row | None:
    return read_json(path) if path.is_file() else None


def _unique(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as make all of them differ."""
    parts = [path.absolute().parts for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
