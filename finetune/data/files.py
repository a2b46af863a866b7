"""Which files a source names, and how they are read: a piece at a time, decompressed on the way, decoded line by line."""

from __future__ import annotations

import glob
import io
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pyarrow

from finetune.config.data import FileSource
from finetune.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import Buffer

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md")
TABLE_SUFFIXES = (".parquet", ".arrow")
_DOCUMENTS = (".txt", ".md")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

MAX_ROW_BYTES = 8 * 2**20
"""Longest line, object or document. It bounds the memory of reading; no model sees as much at once."""
CHUNK_BYTES = 2**20

READ_FAULTS = (OSError, EOFError, pyarrow.ArrowException)
"""What reading a damaged or unreadable file raises, compressed or not."""

Advance = Callable[[int], None]

_KINDS = f"{', '.join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))}, and the text formats as .gz or .zst"
_MAGIC = {
    b"PAR1": ("Parquet", ".parquet"),
    b"ARROW1": ("Arrow", ".arrow"),
    b"\x1f\x8b": ("gzip", ".gz after the format's suffix"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst after the format's suffix"),
    b"PK\x03\x04": ("a zip archive", "a suffix of its own; extract it first (a spreadsheet: save it as CSV)"),
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"
NEWLINE = b"\n"


def kind_of(path: Path) -> str:
    """The suffix that tells the format, without that of compression: ``.jsonl`` for ``a.jsonl.gz``."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix


def data_files(source: FileSource) -> list[Path]:
    """The files behind ``source`` in a fixed order; DataError where there are none, or one cannot be data.

    A directory is searched to its depth, through symbolic links as well; hidden files are left out, and a directory that
    `datasets` saved gives the files its state names. A glob names files, never directories. A file that is met twice, by two links or
    by a glob with two ``**``, is one file.
    """
    path = Path(source.source)
    _refuse_unwritable_name(path)
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        found = _once(_inside(path))
        _refuse_mixture(path, found)
    elif not mode and glob.has_magic(source.source):
        matching = map(Path, glob.iglob(source.source, recursive=True))  # noqa: PTH207 - passes over hidden files
        found = _once(file for file in matching if not stat.S_ISDIR(_mode(file)))
    else:
        found = [path]
    if not found:
        raise DataError("no data file found", where=source.source, fix=f"name a file, directory or glob of {_KINDS}")
    for file in found:
        _refuse_unusable(file)
    return found


def _mode(path: Path) -> int:
    """What ``path`` is, as `stat` tells it; 0 where nothing can be found under this name, for whatever reason."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _once(files: Iterable[Path]) -> list[Path]:
    """In order of their names; of several names for one file the first."""
    return sorted({os.path.realpath(file): file for file in sorted(files, reverse=True)}.values())


def _refuse_unwritable_name(path: Path) -> None:
    """A row's place is text, and so is what is told about it."""
    name = str(path)
    if "\0" in name:
        raise DataError("a NUL character in the name, which no file has", where=name.replace("\0", "\\0"), fix="remove it")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        raise DataError("the file name is not UTF-8 text", where=shown, fix="rename it") from error


def _inside(directory: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"the directory cannot be read: {error.strerror}", where=str(error.filename), fix="give yourself read access")

    seen: set[str] = set()
    for place, names, files in os.walk(directory, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back, or a second one to the same directory
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        if "dataset_dict.json" in files:
            raise DataError(
                "the directory holds several splits of a saved dataset", where=place, fix=f"name one of them: {', '.join(names)}"
            )
        wanted = _saved_by_datasets(Path(place)) if {"state.json", "dataset_info.json"} <= set(files) else files
        yield from (Path(place, name) for name in wanted if not name.startswith("."))


def _saved_by_datasets(directory: Path) -> list[str]:
    """The Arrow files of a directory written by ``Dataset.save_to_disk``, which may hold cached results of other steps too."""
    try:
        return [str(file["filename"]) for file in json.loads((directory / "state.json").read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            "the state of a saved dataset cannot be read", where=str(directory / "state.json"), fix="save the dataset again"
        ) from error


def _refuse_mixture(directory: Path, found: list[Path]) -> None:
    """A README beside rows would be learned by heart as a document."""
    documents = [file for file in found if kind_of(file) in _DOCUMENTS]
    rows = [file for file in found if kind_of(file) not in _DOCUMENTS]
    if documents and rows:
        raise DataError(
            f"the directory holds documents ({documents[0].name}) and rows ({rows[0].name})",
            where=str(directory),
            fix=f"choose with a glob, such as {directory}/**/*{kind_of(rows[0])}",
        )


def _refuse_unusable(file: Path) -> None:
    _refuse_unwritable_name(file)
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise DataError(
            f"no such data file ({error.strerror})",
            where=str(file),
            fix="check the `source` that names it; a relative path starts at the YAML file that holds it, in -o at the working directory",
        ) from error
    if not stat.S_ISREG(mode):
        raise DataError("not a regular file (a directory, pipe, socket or device)", where=str(file), fix="name a file with data")
    kind = kind_of(file)
    if file.suffix in _COMPRESSIONS and kind in TABLE_SUFFIXES:
        raise DataError(f"a compressed {kind} file cannot be read in pieces", where=str(file), fix="decompress it: it is compact already")
    if kind not in (*TEXT_SUFFIXES, *TABLE_SUFFIXES):
        raise DataError(f"unknown kind of file {kind!r}", where=str(file), fix=f"use one of {_KINDS}; a glob leaves others out")


class Counted(io.FileIO):
    """A file on disk that tells how many of its bytes were read."""

    def __init__(self, path: Path, advance: Advance) -> None:
        try:
            super().__init__(path)
        except OSError as error:
            raise DataError(f"the file cannot be opened: {error.strerror}", where=str(path), fix="give yourself read access") from error
        self._advance, self._left = advance, os.fstat(self.fileno()).st_size

    def _count(self, count: int) -> None:
        """Bytes that are read twice, such as the index of a Parquet file, are counted once."""
        count = min(count, self._left)
        self._left -= count
        self._advance(count)

    def readinto(self, buffer: Buffer, /) -> int:
        """As FileIO's; it never blocks, since only regular files are opened."""
        count = super().readinto(buffer) or 0
        self._count(count)
        return count

    def read(self, size: int | None = -1, /) -> bytes:
        """As FileIO's."""
        data = super().read(size) or b""
        self._count(len(data))
        return data


@contextmanager
def opened(path: Path, advance: Advance) -> Iterator[BinaryIO]:
    """The decompressed bytes of a text file; DataError where the start shows another kind of file."""
    with Counted(path, advance) as raw:
        if path.suffix in _COMPRESSIONS:
            _require_compressed(path)
            stream = io.BufferedReader(pyarrow.input_stream(raw, compression=_COMPRESSIONS[path.suffix]), CHUNK_BYTES)
        else:
            stream = io.BufferedReader(raw, CHUNK_BYTES)
        try:
            _refuse_binary(path, stream.peek(8))
        except READ_FAULTS as error:
            raise unreadable(error, path) from error
        yield stream


def unreadable(error: BaseException, path: Path, line: int | None = None) -> DataError:
    """A read fault as an error with its place."""
    where = str(path) if line is None else f"{path}:{line}"
    if path.suffix in _COMPRESSIONS:
        return DataError(f"the compressed file is damaged or cut off: {error}", where=where, fix="copy, download or compress it again")
    return DataError(f"the file cannot be read further: {error}", where=where, fix="check the disk, or copy the file again")


def _require_compressed(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    magic = b"\x1f\x8b" if path.suffix == ".gz" else b"\x28\xb5\x2f\xfd"
    if not start.startswith(magic):
        what = "is empty" if not start else f"is not {_COMPRESSIONS[path.suffix]} data"
        raise DataError(
            f"the file {what}, in spite of its suffix", where=str(path), fix=f"rename it without {path.suffix}, or write it again"
        )


def _refuse_binary(path: Path, start: bytes) -> None:
    for magic, (name, suffix) in _MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"the file is {name}, not {kind_of(path)}", where=str(path), fix=f"give it the suffix {suffix}")
    if start.startswith(_UTF16):
        raise DataError("the file is UTF-16, not UTF-8 text", where=f"{path}:1", fix="convert it: `iconv -f UTF-16 -t UTF-8`")


def lines(path: Path, advance: Advance) -> Iterator[tuple[int, str | DataError]]:
    """Each line with its number, with its line end and without BOM; the error of a line that cannot be used, and then the next.

    Cut at newlines alone: ``str.splitlines`` also cuts at U+2028 and others, which are legal inside JSON strings and CSV fields.
    """
    number = 0
    with opened(path, advance) as stream:
        try:
            while line := stream.readline(MAX_ROW_BYTES + 1):
                number += 1
                if number == 1 and line.startswith(_BOM):
                    line = line[len(_BOM) :]
                if len(line) > MAX_ROW_BYTES:
                    _skip_line(stream, line)
                    yield number, too_long("line", f"{path}:{number}")
                else:
                    yield number, decoded(line, path, number)
        except READ_FAULTS as error:
            yield number + 1, unreadable(error, path, number + 1)


def _skip_line(stream: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = stream.readline(CHUNK_BYTES)


def decoded(data: bytes, path: Path, line: int) -> str | DataError:
    """``data``, which begins on ``line``, as text; or the error of its first byte that is none."""
    if b"\0" in data:
        return not_text(data, data.index(b"\0"), path, line)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return not_text(data, error.start, path, line)


def not_text(data: bytes, position: int, path: Path, line: int) -> DataError:
    """The error of the byte at ``position`` of ``data``, which begins on ``line``."""
    where = f"{path}:{line + data.count(NEWLINE, 0, position)}"
    if data[position] == 0:
        return DataError("a NUL byte, which no text holds", where=where, fix="write the file again as UTF-8 text")
    what = f"not UTF-8 text: byte 0x{data[position]:02x}"
    return DataError(what, where=where, fix="convert the file, for example with `iconv -f LATIN1 -t UTF-8`")


def too_long(what: str, where: str) -> DataError:
    """The error of a row that is larger than memory should have to hold."""
    return DataError(
        f"the {what} is longer than {MAX_ROW_BYTES // 2**20} MiB", where=where, fix="cut it into several, or check for a missing line end"
    )
