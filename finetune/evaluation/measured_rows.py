"""Rows that are measured, a window at a time: memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.config.data import FileSource, HubSource
from finetune.data.files import data_files
from finetune.data.formats import parse
from finetune.data.records import Record, Row
from finetune.data.sources import read_rows
from finetune.errors import DataError, Problem
from finetune.sealed import sha256_of

WINDOW = 512
"""Rows held at once: enough that rows of similar length meet in a batch."""


def row_windows(source: FileSource | HubSource) -> Iterator[list[Row]]:
    """The rows of ``source`` in order, `WINDOW` at a time; DataError with every bad row of the window that has one."""
    rows: list[Row] = []
    problems: list[Problem] = []
    for row in read_rows(source):
        if isinstance(row, DataError):
            problems.extend(row.problems)
        else:
            rows.append(row)
        if len(rows) + len(problems) >= WINDOW:  # one row can have two problems
            _refuse(problems)
            yield rows
            rows = []
    _refuse(problems)
    if rows:
        yield rows


def record_windows(source: FileSource | HubSource) -> Iterator[list[Record]]:
    """The same rows as conversations and texts."""
    for rows in row_windows(source):
        records: list[Record] = []
        problems: list[Problem] = []
        for row in rows:
            try:
                records.append(parse(row, source.format, source.columns))
            except DataError as error:
                problems.extend(error.problems)
        _refuse(problems)
        yield records


def identity(source: FileSource | HubSource) -> dict[str, Any]:
    """What the rows are, so that a later reader can tell whether they are the same: the section, and the sha256 of each file."""
    found: dict[str, Any] = source.model_dump(mode="json", exclude={"weight"})
    if isinstance(source, FileSource):
        found["sha256"] = {str(path): sha256_of(path) for path in data_files(source)}
    return found


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise DataError.from_problems(problems)
