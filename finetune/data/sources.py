"""Rows of a data file, each with the place it came from."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")


@dataclass(frozen=True, slots=True)
class Row:
    """One record and its place, such as ``chat.jsonl:17``."""

    values: dict[str, Any]
    where: str


def read_rows(source: str) -> Iterator[Row]:
    """Every row of a file, a directory or a glob; DataError with file and line where something is wrong."""
    for path in _files(source):
        yield from _READERS[path.suffix](path)


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
    elif any(character in source for character in "*?["):
        anchor = Path(path.anchor or ".")
        found = sorted(anchor.glob(str(path.relative_to(anchor) if path.anchor else path)))
    else:
        found = [path]
    if not found:
        raise DataError("no data file found", where=source, fix=f"name a file, directory or glob with {', '.join(_SUFFIXES)}")
    for file in found:
        if not file.is_file():
            raise DataError(
                "no such data file", where=str(file), fix="check `data.train` and `data.validation`; relative paths start at the config"
            )
        if file.suffix not in _SUFFIXES:
            raise DataError(f"unknown kind of file {file.suffix!r}", where=str(file), fix=f"use one of {', '.join(_SUFFIXES)}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError("not UTF-8 text", where=f"{path}:{line}", fix="convert the file, for example with `iconv -t UTF-8`") from error


def _object(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"a row must be an object, not {type(value).__name__}", where=where, fix='write rows such as {"messages": [...]}')
    return Row(value, where)


class _DuplicateKeyError(ValueError):
    """An object names a key twice, of which JSON readers silently keep the last."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _DuplicateKeyError(f"the key {key!r} stands more than once in one object")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _decode(text: str, path: Path, line: int, fix: str) -> object:
    """The JSON value of ``text``, which begins on ``line`` of the file."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        excerpt = _start(text.split("\n")[error.lineno - 1])
        raise DataError(f"not valid JSON: {error.msg} at column {error.colno}", where=where, excerpt=excerpt, fix=fix) from error
    except _DuplicateKeyError as error:
        raise DataError(str(error), where=f"{path}:{line + _lines_before_fault(text)}", fix="keep one of them, or rename it") from error
    except RecursionError as error:
        where = f"{path}:{line + _lines_before_fault(text)}"
        raise DataError("the JSON is nested too deeply to be read", where=where, fix="flatten the row, or remove it") from error
    except ValueError as error:  # a number with thousands of digits
        raise DataError(
            f"not readable JSON: {error}", where=f"{path}:{line + _lines_before_fault(text)}", fix="write it as a string"
        ) from error


def _lines_before_fault(text: str) -> int:
    """Number of line ends before the row at which decoding fails; errors other than of syntax do not tell their place."""
    position = _match_end(r"\s*\[?", text, 0)
    try:
        while True:
            position = _match_end(r"[\s,]*", text, position)
            _, position = _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError):
        return text.count("\n", 0, position)


def _match_end(pattern: str, text: str, position: int) -> int:
    found = re.compile(pattern).match(text, position)
    return found.end() if found else position


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Split on newlines alone: str.splitlines also cuts at U+2028 and others, which are legal inside JSON strings.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        yield _object(_decode(line, path, number, fix="one complete JSON object a line"), f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Row]:
    value = _decode(_text(path), path, 1, fix="one list of objects; for an object a line use .jsonl")
    if not isinstance(value, list):
        raise DataError("a .json file must hold one list of objects", where=str(path), fix="for an object a line use .jsonl")
    for number, row in enumerate(value, start=1):
        yield _object(row, f"{path} row {number}")


def _read_csv(path: Path) -> Iterator[Row]:
    text = _text(path)
    # All rows at once: the limit holds for the whole process, so it may not stay changed while the caller works between two rows.
    with _csv_fields_up_to(len(text)):
        rows = _csv_rows(text, path)
    yield from rows


@contextmanager
def _csv_fields_up_to(length: int) -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters a field: no field is longer than its file."""
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, length))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv_rows(text: str, path: Path) -> list[Row]:
    # StringIO cuts at newlines alone: str.splitlines also cuts at U+2028, form feeds and others, which are legal inside fields.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            where = f"{path}:{reader.reader.line_num}"  # DictReader's own number leaves out the empty lines before this row
            if None in row or None in row.values():
                raise DataError("the row does not have as many columns as the header", where=where, fix="quote fields that hold commas")
            rows.append(Row(dict(row), where))
    except csv.Error as error:
        raise DataError(
            # where the row begins: a quote that is never closed reaches to the end of the file
            f"not valid CSV: {error}",
            where=f"{path}:{reader.line_num + 1}",
            fix="quote fields that hold quotes or newlines",
        ) from error
    return rows


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(values, f"{path} row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"not valid Parquet: {error}", where=str(path), fix="write the file again") from error


def _read_text(path: Path) -> Iterator[Row]:
    yield Row({"text": _text(path)}, str(path))


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}


def _start(text: str, length: int = 100) -> str:
    return text if len(text) <= length else text[:length] + "…"
