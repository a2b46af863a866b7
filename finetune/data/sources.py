"""Rows of a source, each with the place it came from: read lazily, so that files may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.config.data import FileSource, HubSource
from finetune.data.files import MAX_ROW_BYTES, READ_FAULTS, Advance, data_files, decoded, kind_of, opened, too_long, unreadable
from finetune.data.hub import read_hub
from finetune.data.json_rows import read_json, read_jsonl
from finetune.data.records import Row
from finetune.data.table_rows import read_arrow, read_csv, read_parquet
from finetune.errors import DataError

__all__ = ["Row", "data_files", "read_rows"]


def _nowhere(_: int) -> None:
    """Nobody watches how far reading has come."""


def read_rows(source: FileSource | HubSource, advance: Advance = _nowhere) -> Iterator[Row | DataError]:
    """Every row of ``source``. A bad row comes as its DataError, and reading goes on where the next row can be told.

    ``advance(n)`` is called as ``n`` more bytes of a file have been read; for the hub, never. No more than a few rows are held at a
    time, and no URL that a row or a configuration names is opened.
    """
    if isinstance(source, HubSource):
        yield from _caught(read_hub(source))
        return
    try:
        files = data_files(source)
    except DataError as error:
        yield error
        return
    for path in files:
        yield from _file_rows(path, advance)


def _file_rows(path: Path, advance: Advance) -> Iterator[Row | DataError]:
    empty = True
    for row in _caught(_READERS[kind_of(path)](path, advance)):
        empty = False
        yield row
    if empty:
        yield DataError("the file gives no row: it is empty", where=str(path), fix="fill it, or leave it out")


def _caught(rows: Iterator[Row | DataError]) -> Iterator[Row | DataError]:
    """The rows; what ends them early is the last."""
    try:
        yield from rows
    except DataError as error:
        yield error


def _read_document(path: Path, advance: Advance) -> Iterator[Row | DataError]:
    """The whole file as one document, with line ends as ``\\n``."""
    with opened(path, advance) as stream:
        try:
            data = stream.read(MAX_ROW_BYTES + 1)
        except READ_FAULTS as error:
            yield unreadable(error, path)
            return
    if len(data) > MAX_ROW_BYTES:
        yield too_long("document", str(path))
        return
    text = decoded(data.removeprefix(b"\xef\xbb\xbf"), path, 1)
    if isinstance(text, DataError):
        yield text
    elif text:
        yield Row({"text": text.replace("\r\n", "\n").replace("\r", "\n")}, str(path))


_READERS: dict[str, Callable[[Path, Advance], Iterator[Row | DataError]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": _read_document,
    ".md": _read_document,
}
