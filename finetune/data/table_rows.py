"""Rows of tables: CSV and TSV line by line, Parquet and Arrow by record batches."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from finetune.data.files import CHUNK_BYTES, MAX_ROW_BYTES, Advance, Counted, kind_of, lines, too_long
from finetune.data.records import Row
from finetune.errors import DataError

_BLOCK_ROWS = 256
_BATCH_BYTES = 4 * 2**20


def read_csv(path: Path, advance: Advance) -> Iterator[Row | DataError]:
    """The rows below the header, each with the line on which it begins; DataError where the header cannot be used."""
    table = _Table(path, advance)
    header = table.next()
    if header is None:
        return
    if isinstance(header, DataError):
        raise header
    names = _checked_header(header.values, table)
    while block := _block(table):
        for found in block:
            yield found if isinstance(found, DataError) else _named(found, names)


def _checked_header(names: list[str], table: _Table) -> list[str]:
    where = f"{table.path}:1"
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise DataError(f"the column {twice[0]!r} stands more than once in the header", where=where, fix="rename or remove one of them")
    if "" in (name.strip() for name in names):
        number = [name.strip() for name in names].index("") + 1
        raise DataError(f"column {number} of the header has no name", where=where, fix="name every column in the first line")
    other = next((mark for mark in (";", "\t", ",", "|") if mark != table.delimiter and mark in names[0]), None)
    if len(names) == 1 and other:
        raise DataError(
            f"the header has one column, and {other!r} in it: the columns are not separated by {table.delimiter!r}",
            where=where,
            fix="separate columns by commas in .csv and by tabs in .tsv",
        )
    return names


def _named(found: _Fields, names: list[str]) -> Row | DataError:
    if len(found.values) != len(names):
        return DataError(
            f"the row does not have as many columns as the header: {len(found.values)}, not {len(names)}",
            where=found.where,
            fix="quote fields that hold the separator, and fill in missing ones",
        )
    return Row(dict(zip(names, found.values, strict=True)), found.where)


class _Fields:
    """The fields of one row and where it begins."""

    __slots__ = ("values", "where")

    def __init__(self, values: list[str], where: str) -> None:
        self.values, self.where = values, where


def _block(table: _Table) -> list[_Fields | DataError]:
    """Some rows at once: the limit on fields holds for the whole process, so it may not stay lifted while the caller works."""
    block: list[_Fields | DataError] = []
    table.taken = 0
    with _csv_fields_up_to(MAX_ROW_BYTES):
        while len(block) < _BLOCK_ROWS and table.taken < _BATCH_BYTES and (found := table.next()) is not None:
            block.append(found)
    return block


@contextmanager
def _csv_fields_up_to(length: int) -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters a field: a field may be as long as a row."""
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, length))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


class _Table:
    """A CSV reader that knows where each row begins, and goes on after a row that it cannot read."""

    def __init__(self, path: Path, advance: Advance) -> None:
        self.path, self.delimiter = path, "\t" if kind_of(path) == ".tsv" else ","
        self.taken = 0
        """Characters read since the start of the block."""
        self._lines = lines(path, advance)
        self._rows = csv.reader(self._feed(), delimiter=self.delimiter, strict=True)
        self._line, self._first_line, self._row_length = 0, 1, 0
        self._ended = False

    def _feed(self) -> Iterator[str]:
        # An object of its own, not a generator: a generator would be over after the first error it raises.
        return iter(_Feed(self))

    def line(self) -> str:
        """The next line, for the csv module; raises the DataError of a line that is none, and StopIteration at the end."""
        self._line, text = next(self._lines)
        if isinstance(text, DataError):
            raise text
        self.taken += len(text)
        self._row_length += len(text)
        if self._row_length > MAX_ROW_BYTES:
            raise too_long("row", f"{self.path}:{self._first_line}")
        return text[:-2] + "\n" if text.endswith("\r\n") else text  # a quoted field of several lines has one kind of line end

    def next(self) -> _Fields | DataError | None:
        """The next row that is not an empty line, the error of one, or None at the end."""
        while not self._ended:
            self._first_line, self._row_length = self._line + 1, 0
            where = f"{self.path}:{self._first_line}"
            try:
                values = next(self._rows)
            except StopIteration:
                return None
            except DataError as error:
                self._end_inside_row()
                return error
            except csv.Error as error:
                self._end_inside_row()
                return DataError(f"not valid CSV: {error}", where=where, fix="quote fields that hold quotes or newlines")
            if values:
                return _Fields(values, where)
        return None

    def _end_inside_row(self) -> None:
        """After an error in a row of several lines nobody knows where the next one begins."""
        self._ended = self._line > self._first_line


class _Feed:
    """The lines of a table as the csv module wants them."""

    def __init__(self, table: _Table) -> None:
        self._table = table

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return self._table.line()


def read_parquet(path: Path, advance: Advance) -> Iterator[Row | DataError]:
    """Rows by record batches of about 4 MiB."""
    with Counted(path, advance) as raw:
        try:
            file = pyarrow.parquet.ParquetFile(raw, buffer_size=CHUNK_BYTES, pre_buffer=False)
            yield from batch_rows(_parquet_batches(file), str(path))
        except (pyarrow.ArrowException, OSError) as error:
            yield _damaged("Parquet", error, path)


def _parquet_batches(file: pyarrow.parquet.ParquetFile) -> Iterator[pyarrow.RecordBatch]:
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
        yield from file.iter_batches(batch_size=min(4096, max(1, _BATCH_BYTES // row_bytes)), row_groups=[number])


def read_arrow(path: Path, advance: Advance) -> Iterator[Row | DataError]:
    """Rows of an IPC file or stream through a memory map, as `datasets` saves them."""
    try:
        with pyarrow.memory_map(str(path)) as mapped:
            yield from batch_rows(_validated(_arrow_batches(mapped, path.stat().st_size, advance)), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        yield _damaged("Arrow", error, path)


def _validated(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """The batches; ArrowInvalid at one whose offsets lead out of the file, which would end the process."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _arrow_batches(mapped: pyarrow.MemoryMappedFile, size: int, advance: Advance) -> Iterator[pyarrow.RecordBatch]:
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    if not is_file:
        before = 0
        for batch in pyarrow.ipc.open_stream(mapped):
            advance(mapped.tell() - before)
            before = mapped.tell()
            yield batch
        advance(size - before)
        return
    reader = pyarrow.ipc.open_file(mapped)
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)
        advance(size * (number + 1) // reader.num_record_batches - size * number // reader.num_record_batches)


def _damaged(kind: str, error: BaseException, path: Path) -> DataError:
    return DataError(f"not valid {kind}, or damaged: {_first_line(error)}", where=str(path), fix="copy, download or write the file again")


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]


def batch_rows(batches: Iterable[pyarrow.RecordBatch], where: str) -> Iterator[Row | DataError]:
    """The rows of ``batches`` as Python values, each with its number from 1."""
    number = 0
    for batch in batches:
        _require_unique(batch.schema.names, where)
        for piece in _pieces(batch):
            yield from _piece_rows(piece, where, number)
            number += piece.num_rows


def _require_unique(names: list[str], where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"the column {twice[0]!r} stands more than once", where=where, fix="rename or remove one of them")


def _pieces(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    """Halves of the batch until each is small: as Python values a batch takes several times its size."""
    if batch.num_rows <= 1 or batch.nbytes <= MAX_ROW_BYTES:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _pieces(batch.slice(0, half))
    yield from _pieces(batch.slice(half))


def _piece_rows(piece: pyarrow.RecordBatch, where: str, before: int) -> Iterator[Row | DataError]:
    if piece.num_rows == 1 and piece.nbytes > MAX_ROW_BYTES:
        yield too_long("row", f"{where} row {before + 1}")
        return
    try:
        rows = piece.to_pylist()
    except (pyarrow.ArrowException, LookupError, OverflowError, ValueError):  # perhaps of one row alone
        rows = [_python_row(piece.slice(index, 1), f"{where} row {before + index + 1}") for index in range(piece.num_rows)]
    nested = [field.name for field in piece.schema if pyarrow.types.is_nested(field.type)]
    for number, values in enumerate(rows, start=before + 1):
        if isinstance(values, DataError):
            yield values
            continue
        for name in nested:
            values[name] = _without_nulls(values[name])
        yield Row(values, f"{where} row {number}")


def _python_row(row: pyarrow.RecordBatch, where: str) -> dict[str, Any] | DataError:
    try:
        values: dict[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text: byte 0x{error.object[error.start]:02x}"
        return DataError(what, where=where, fix="write the text of this row as UTF-8")
    except (pyarrow.ArrowException, LookupError) as error:  # where pytz is there, a zone that it does not know is a KeyError
        return _unknown_zone(row, where) or DataError(
            f"a column cannot be read: {_first_line(error)}", where=where, fix="remove the column, or write it as text"
        )
    except (OverflowError, ValueError) as error:
        return DataError(f"a date, time or number is out of range: {error}", where=where, fix="correct it, or remove the row or the column")
    return values


def _unknown_zone(row: pyarrow.RecordBatch, where: str) -> DataError | None:
    for field in row.schema:
        if pyarrow.types.is_timestamp(field.type) and field.type.tz is not None:
            try:
                pyarrow.lib.string_to_tzinfo(field.type.tz)
            except (pyarrow.ArrowException, LookupError, ValueError):
                return DataError(
                    f"the times in column {field.name!r} are in the time zone {field.type.tz!r}, which is not known here",
                    where=where,
                    fix="write them in another time zone, or remove the column",
                )
    return None


def _without_nulls(value: Any) -> Any:
    """Lists and structs without members that are null.

    All values of an Arrow column have one type, so where one row calls a tool with `city` and another one with `zone`, every call of the
    file has both keys, one of them null. In a message null says nothing; in a tool's arguments or schema the model would learn to write it.
    A null that the row's author meant cannot be told from these, as it can in JSON, where it is kept.
    """
    if type(value) is dict:
        return {key: _without_nulls(item) if type(item) in (dict, list) else item for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if type(value) is list else value
