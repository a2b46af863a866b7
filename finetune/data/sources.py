"""Rows of a data file, each with the place it came from."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
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


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Split on newlines alone: str.splitlines also cuts at U+2028 and others, which are legal inside JSON strings.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"not valid JSON: {error}", where=where, excerpt=_start(line), fix="one complete JSON object a line") from error
        yield _object(value, where)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON: {error.msg}", where=f"{path}:{error.lineno}", fix="one list of objects; for an object a line use .jsonl"
        ) from error
    if not isinstance(value, list):
        raise DataError("a .json file must hold one list of objects", where=str(path), fix="for an object a line use .jsonl")
    for number, row in enumerate(value, start=1):
        yield _object(row, f"{path} row {number}")


def _read_csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(_text(path).splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError("the row does not have as many columns as the header", where=where, fix="quote fields that hold commas")
            yield Row(dict(row), where)
    except csv.Error as error:
        raise DataError(
            f"not valid CSV: {error}", where=f"{path}:{reader.line_num}", fix="quote fields that hold quotes or newlines"
        ) from error


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
