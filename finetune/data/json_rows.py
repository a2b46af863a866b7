"""Rows of JSON: an object a line, or one list of objects, of which never more than one row is held."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.files import CHUNK_BYTES, MAX_ROW_BYTES, READ_FAULTS, Advance, lines, not_text, opened, unreadable
from finetune.data.records import Row
from finetune.data.shown import shown
from finetune.data.strict_json import JsonFault, decode, decode_at, skip
from finetune.errors import DataError

_SPACE = " \t\r\n"
_AFTER_SPACE = re.compile(r"[ \t\r\n]*")
_TOO_LONG = (f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB", "cut it into several rows")
_ONE_LIST = "a .json file must hold one list of objects"


def read_jsonl(path: Path, advance: Advance) -> Iterator[Row | DataError]:
    """A row a line; empty lines are passed over."""
    seen = False
    for number, line in lines(path, advance):
        row = _line_row(line, f"{path}:{number}")
        if row is None:
            continue
        if not seen and isinstance(row, DataError) and (other := _other_layout(str(line).strip(_SPACE), f"{path}:{number}")):
            yield other
            return
        seen = True
        yield row


def _line_row(line: str | DataError, where: str) -> Row | DataError | None:
    if isinstance(line, DataError):
        return line
    text = line.strip(_SPACE)
    if not text:
        return None
    try:
        return _row(decode(text), where)
    except JsonFault as fault:
        column = f" at column {fault.position + 1}" if fault.position is not None else ""
        return DataError(fault.what + column, where=where, fix=fault.fix, excerpt=start_of(text, fault.position))


def _other_layout(line: str, where: str) -> DataError | None:
    """The error of a file that is no JSON Lines at all: without it, every line would have one of its own."""
    if line.startswith("[{") or line == "[":
        return DataError("the file holds one JSON list, not an object a line", where=where, fix="give it the suffix .json")
    if line == "{":
        fix = "write each object on one line (`jq -c .`), or a list of objects as .json"
        return DataError("not valid JSON: an object of the file spans several lines", where=where, fix=fix)
    return None


def _row(value: object, where: str) -> Row | DataError:
    if isinstance(value, dict):
        return Row(value, where)
    return DataError(f"a row must be an object, not {type(value).__name__}", where=where, fix='write rows such as {"messages": [...]}')


def start_of(text: str, position: int | None = None, length: int = 100) -> str:
    """About ``length`` characters of ``text``: its start, or what surrounds ``position``."""
    first = max(0, (position or 0) - length // 2) if len(text) > length else 0
    piece = text[first : first + length].split("\n")[0]
    return ("…" if first else "") + shown(piece) + ("…" if first + length < len(text) else "")


def read_json(path: Path, advance: Advance) -> Iterator[Row | DataError]:
    """The objects of a list, each with the line on which it begins."""
    with opened(path, advance) as stream:
        window = _Window(path, stream)
        try:
            yield from _list_rows(window)
        except JsonFault as fault:
            where = f"{path}:{window.line_of(fault.position)}"
            yield DataError(fault.what, where=where, fix=fault.fix, excerpt=start_of(window.text[window.at :]))
        except READ_FAULTS as error:
            yield unreadable(error, path, window.line_of(len(window.text)))


def _list_rows(window: _Window) -> Iterator[Row | DataError]:
    first = window.next_character()
    if first != "[":
        if first:
            yield _no_list(window)
        return
    window.move(window.at + 1)
    if window.next_character() != "]":
        number = 0
        while True:
            number += 1
            yield _next_row(window, f"{window.path}:{window.line} row {number}")
            after = window.next_character()
            if after != ",":
                break
            window.move(window.at + 1)
            window.next_character()
        if after != "]":
            raise JsonFault("not valid JSON: the list is cut off or lacks a comma", "close the list with `]`; rows need commas between")
    window.move(window.at + 1)
    if window.next_character():
        raise JsonFault("not valid JSON: text follows the list", "remove what stands after the closing `]`", window.at)


def _no_list(window: _Window) -> DataError:
    where = f"{window.path}:{window.line}"
    try:
        value = window.decode()
    except JsonFault as fault:
        return DataError(fault.what, where=f"{window.path}:{window.line_of(fault.position)}", fix=fault.fix)
    if isinstance(value, dict) and window.next_character() == "{":
        return DataError(f"{_ONE_LIST}, this one holds an object a line", where=where, fix="give it the suffix .jsonl")
    named = f"an object with the keys {', '.join(map(repr, [*value][:5]))}" if isinstance(value, dict) else type(value).__name__
    return DataError(f"{_ONE_LIST}, not {named}", where=where, fix="write `[{...}, {...}]`; for an object a line use .jsonl")


def _next_row(window: _Window, where: str) -> Row | DataError:
    """The row at the window's place, which is passed; JsonFault where the end of the row cannot be told."""
    try:
        return _row(window.decode(), where)
    except JsonFault as fault:
        if fault.position is not None:
            raise
        end = skip(window.text, window.at)
        if end is None:
            raise JsonFault(fault.what, fault.fix, window.at) from None
        excerpt = start_of(window.text[window.at : end])
        window.move(end)
        return DataError(fault.what, where=where, fix=fault.fix, excerpt=excerpt)


class _Window:
    """The part of a JSON text that is being looked at; it slides over the file."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self._stream = path, stream
        self.text, self.at, self.line = "", 0, 1
        self._ended, self._first = False, True
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def line_of(self, position: int | None) -> int:
        """Line of the index ``position`` of the text; of the place itself where it is None."""
        return self.line if position is None else self.line + self.text.count("\n", self.at, position)

    def move(self, to: int) -> None:
        """Go on to the index ``to``."""
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def next_character(self) -> str:
        """The first character that is no white space, to which the window moves; empty at the end of the file."""
        while True:
            found = _AFTER_SPACE.match(self.text, self.at)
            self.move(found.end() if found else self.at)
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def decode(self) -> Any:
        """The value at the window's place, which is passed; JsonFault where it is none, or is too long."""
        while True:
            try:
                value, end = decode_at(self.text, self.at)
            except JsonFault as fault:
                # What is cut off by the end of the window may be whole once more is read.
                if (fault.position is None and skip(self.text, self.at) is not None) or not self._more_of_row():
                    raise self._too_long_or(fault) from None
                continue
            if end < len(self.text) or not self._more_of_row():
                break
        if end - self.at > MAX_ROW_BYTES:
            raise JsonFault(*_TOO_LONG)
        self.move(end)
        return value

    def _too_long_or(self, fault: JsonFault) -> JsonFault:
        """Syntax that breaks where the window ends is that of a row which goes on behind it."""
        held, broken = len(self.text) - self.at, fault.position
        if held <= MAX_ROW_BYTES or self._ended or broken is None:
            return fault
        return JsonFault(*_TOO_LONG, self.at) if broken > len(self.text) - 16 or "Unterminated" in fault.what else fault

    def _more_of_row(self) -> bool:
        """As much again of the row, up to the longest a row may be."""
        held = len(self.text) - self.at
        if held > MAX_ROW_BYTES:
            return False
        while self._more() and len(self.text) - self.at < 2 * held:
            pass
        return len(self.text) - self.at > held

    def _more(self) -> bool:
        """Another piece of the file, where there is one; the text before the place is let go."""
        if self._ended:
            return False
        data = self._stream.read(CHUNK_BYTES)
        piece = self._as_text(data)
        if not data:
            self._ended = True
            return False
        if self._first:
            self._first, piece = False, piece.removeprefix("\ufeff")
        self.text, self.at = self.text[self.at :] + piece, 0
        return True

    def _as_text(self, data: bytes) -> str:
        """Raises DataError: nobody can say where the next row begins in bytes that are no text."""
        line = self.line_of(len(self.text))
        if b"\0" in data:
            raise not_text(data, data.index(b"\0"), self.path, line)
        try:
            return self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_text(error.object, error.start, self.path, line) from None
