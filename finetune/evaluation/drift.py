"""A finished run on newer data: its loss there against its validation rows, and how much of its gain over the base is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import Config, FileSource, HubSource
from finetune.data.prepare import prepare
from finetune.data.render import Example
from finetune.errors import ConfigError, DataError
from finetune.finished import FinishedRun, load_run
from finetune.runs import RunDirectory
from finetune.scoring import Scorer

_LEAST_ROWS = 10
"""Fewer have no interval worth the name."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Nats a supervised token over rows, which are drawn as a whole: a ratio of two sums, with its linearized standard error
    (Cochran, Sampling Techniques, section 6.4)."""

    mean: float
    error: float


@dataclass(frozen=True, slots=True)
class Side:
    """One set of rows."""

    rows: int
    loss: Ratio
    """Of the tuned model."""
    gain: Ratio
    """Loss of the base minus that of the tuned model."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Newer rows beside validation rows."""

    source: Path
    validation: Side
    newer: Side


def compare(run: RunDirectory, config: Config, newer: Path, progress: Callable[[str, int], None] = lambda *_: None) -> Compared:
    """Score the rows of the file ``newer``, prepared as the run's own were, and the run's validation rows; ``progress(side, rows)``.

    ConfigError where the run is not finished or was not validated, DataError where either side has fewer than ten rows.
    """
    path = newer.absolute()
    if not path.is_file():
        fix = "name a file; a relative path starts at the working directory"
        raise DataError("there is no such file of newer data", where=f"--against {newer}", fix=fix)
    finished = load_run(run, config)
    if not finished.has_validation:
        fix = "train with data.validation={fraction: 0.02}"
        raise ConfigError("the run has no validation rows that newer data could be compared with", where=str(run.path), fix=fix)
    rows = _prepared(config, path, finished)
    if len(rows) < _LEAST_ROWS:
        raise DataError(f"{len(rows)} rows are too few to compare losses", where=str(path), fix=f"give {_LEAST_ROWS} or more")
    if (held := len(finished.rows)) < _LEAST_ROWS:
        what = f"the run has {held} validation row{'s' * (held != 1)}, too few to compare newer data with"
        fix = f"train with a larger data.validation: {_LEAST_ROWS} rows or more"
        raise DataError(what, where=str(run.path), fix=fix)
    validation = _side(finished, finished.rows, lambda count: progress("validation rows", count))
    return Compared(path, validation, _side(finished, rows, lambda count: progress("newer rows", count)))


def _prepared(config: Config, path: Path, finished: FinishedRun) -> Sequence[Example]:
    first = config.data.train[0]
    alike: dict[str, Any] = {"format": first.format, "columns": first.columns} if isinstance(first, FileSource | HubSource) else {}
    source = FileSource(source=str(path), **alike)
    return prepare(config.data.model_copy(update={"train": (source,), "validation": None}), finished.renderer, config.seed).train


def _side(finished: FinishedRun, rows: Sequence[Example], advance: Callable[[int], None]) -> Side:
    tuned = _sums(finished.scorer(finished.model), rows, advance)
    model, using = finished.untrained()
    with using():
        base = _sums(finished.scorer(model), rows, advance)
    counts = [row.supervised for row in rows]
    gains = [before - after for before, after in zip(base, tuned, strict=True)]
    return Side(len(rows), ratio(tuned, counts), ratio(gains, counts))


def _sums(scorer: Scorer, rows: Sequence[Example], advance: Callable[[int], None]) -> list[float]:
    """Nats of each row."""
    sums = [0.0] * len(rows)
    for index, losses in scorer.losses(rows, advance):
        sums[index] = float(losses.sum())
    return sums


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Ratio:
    """The sum of ``sums`` over the sum of ``counts`` (at least two rows) and its standard error."""
    mean, rows = sum(sums) / sum(counts), len(sums)
    squares = sum((value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True))
    return Ratio(mean, math.sqrt(rows / (rows - 1) * squares) / sum(counts))
