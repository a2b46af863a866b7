"""All rows of all sources as a stream: cut into chunks, worked on in order, written to one Arrow file as they come."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from finetune.config.data import Data, FileSource, Icd10cm, Source
from finetune.data.arrange import with_rest
from finetune.data.examples import SCHEMA
from finetune.data.files import data_files
from finetune.data.icd10cm_rows import training_rows
from finetune.data.key import sources
from finetune.data.near import SignatureFile
from finetune.data.records import Row
from finetune.data.rows import PROBLEMS, Chunk, Index, Tally, Worked, Worker
from finetune.data.sources import read_rows
from finetune.data.workers import in_order
from finetune.errors import DataError, Problem
from finetune.process import collector_at_rest

Progress = Callable[[str, int, int], None]
"""(stage, done, of): bytes while reading; ``of`` is 0 where the end is not known."""

CHUNK_ROWS = 1000
_CHUNK_CHARACTERS = 2**20
_BAD_ROWS = 1000  # reading stops here: the file is of another kind than its user thinks


class _Gathered:
    """What the chunks add up to; bad rows first of all."""

    def __init__(self, data: Data) -> None:
        self.tallies = [Tally() for _ in sources(data)]
        self.parts: list[Index] = []
        self.problems: list[Problem] = []
        self.bad_rows = 0

    def add(self, worked: Worked) -> None:
        """Count ``worked``; DataError where there are so many bad rows that reading on is no use."""
        self.tallies[worked.source].add(worked.tally)
        self.parts.append(worked.index)
        self.problems = [*self.problems, *worked.problems][:PROBLEMS]
        self.bad_rows += worked.bad_rows
        if self.bad_rows >= _BAD_ROWS:
            self.require_good("bad rows, as far as was read")

    def require_good(self, rest: str = "bad rows") -> None:
        """DataError with every bad row."""
        if self.problems:
            raise DataError.from_problems(with_rest(self.problems, self.bad_rows, rest))


def read_all(path: Path, worker: Worker, near: SignatureFile | None, progress: Progress) -> tuple[Index, list[Tally]]:
    """Every example to the Arrow file at ``path`` and its signature to ``near``; the index of all and what became of each source's rows.

    DataError with the first `PROBLEMS` bad rows of all sources and the number of the others.
    """
    gathered = _Gathered(worker.data)
    processes = None if worker.data.processes == "auto" else worker.data.processes
    with pa.ipc.new_file(str(path), SCHEMA) as file, collector_at_rest():
        for worked in in_order(worker, _chunks(worker.data, progress), processes):
            gc.collect(1)
            gathered.add(worked)
            if gathered.problems:
                continue  # nothing will be kept: read on only to find the other bad rows
            file.write_batch(worked.batch)
            if near is not None and worked.signatures is not None:
                near.append(worked.signatures)
    gathered.require_good()
    return Index.joined(gathered.parts) if gathered.parts else _no_rows(), gathered.tallies


def _no_rows() -> Index:
    words = np.empty(0, np.uint64)
    ints = np.empty(0, np.int32)
    return Index(
        ints.astype(np.int16), ints.astype(np.int64), ints, ints, words.reshape(0, 2), words.reshape(0, 2), words, ints.astype(np.uint8)
    )


def _chunks(data: Data, progress: Progress) -> Iterator[Chunk]:
    """Rows of all sources in chunks that hold no two sources, so that no chunk depends on how many processes work."""
    first, read = 0, 0
    files = [path for source in sources(data) if isinstance(source, FileSource) for path in data_files(source)]
    of = sum(path.stat().st_size for path in files)

    def advance(count: int) -> None:
        nonlocal read
        read += count
        progress("reading", read, of)

    for number, source in enumerate(sources(data)):
        for items in _grouped(_rows(source, advance)):
            yield Chunk(number, first, items, *(("chat", {}) if isinstance(source, Icd10cm) else (source.format, source.columns)))
            first += len(items)


def _rows(source: Source, advance: Callable[[int], None]) -> Iterator[Row | DataError]:
    if isinstance(source, Icd10cm):
        return (Row(values, f"{source.source} row {number}") for number, values in enumerate(training_rows(source), start=1))
    return read_rows(source, advance)


def _grouped(rows: Iterator[Row | DataError]) -> Iterator[list[Row | DataError]]:
    items: list[Row | DataError] = []
    characters = 0
    for row in rows:
        items.append(row)
        characters += 0 if isinstance(row, DataError) else _characters(row.values)
        if len(items) == CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
            yield items
            items, characters = [], 0
    if items:
        yield items


def _characters(value: object) -> int:
    """Of all texts in ``value``."""
    if type(value) is str:
        return len(value)
    if type(value) is dict:
        value = value.values()
    elif type(value) is not list:
        return 0
    total = 0
    for item in value:
        total += len(item) if type(item) is str else _characters(item)
    return total
