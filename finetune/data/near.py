"""Rows that say nearly the same: MinHash over sequences of five words, and bands of it that bring candidates together.

A. Broder, "On the resemblance and containment of documents", SEQUENCES 1997; banding after Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", chapter 3. 64 permutations in 16 bands of 4 bring nearly every pair of Jaccard similarity 0.8 together; a pair counts
where 80 % of its permutations agree, which is the similarity give or take 0.05. System messages are left out: shared ones would make all
rows alike; a list of tools counts as one word for the same reason. In scripts that set no spaces, such as Chinese or Thai, every character
is a word.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np
import numpy.typing as npt
from rensa import RMinHash

from finetune.data.examples import Rows
from finetune.data.records import Record, Text

Signatures = npt.NDArray[np.uint32]  # (n, PERMUTATIONS)
Words = npt.NDArray[np.uint64]

PERMUTATIONS = 64
BANDS = 16
THRESHOLD = 0.8
SHINGLE = 5
_SEED = 42
_LONG_WORD = 32  # bytes of a word on average: no language has such, but lists without spaces and encoded data do
_SCRIPTS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = re.compile(f"[{_SCRIPTS}]")
_PIECES = re.compile(f"[{_SCRIPTS}]|[^\\s{_SCRIPTS}]+")
_FEW = 4
_COMPARED = 2**14  # pairs at a time: 8 MiB
_LOW = np.int64(2**32 - 1)
_ODD = np.uint64(0x9E3779B97F4A7C15)


def signatures(records: Sequence[Record]) -> Signatures:
    """MinHash of each record; equal for records with the same sequences of words, whatever their case and spacing."""
    words = [list(map(crc32, _words(_text(record).lower()))) for record in records]
    hashes, offsets = _shingles(words)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, _SEED)
    numbers = b"".join([array("I", row) for row in matrix.to_rows()])  # half the time of `np.fromiter`
    return np.frombuffer(numbers, np.uint32).reshape(len(records), PERMUTATIONS)


def _text(record: Record) -> str:
    if isinstance(record, Text):
        return record.text
    text = " ".join([message.content for message in record.messages if message.role != "system"])
    calls = [str(call["function"]) for message in record.messages if message.tool_calls for call in message.tool_calls]
    if record.tools:
        calls.append(f"tools:{crc32(str(record.tools).encode('utf-8', 'surrogatepass'))}")
    return " ".join([text, *calls]) if calls else text


def _words(text: str) -> list[bytes]:
    """Words of a text in small letters, in UTF-8; single characters where it has none."""
    data = text.encode("utf-8", "surrogatepass")
    if len(data) != len(text) and _UNSPACED.search(text):
        return [word.encode("utf-8", "surrogatepass") for word in _PIECES.findall(text)]
    words = data.split()
    if len(data) > _LONG_WORD * len(words):
        return [character.encode("utf-8", "surrogatepass") for character in text if not character.isspace()]
    return words


def _shingles(rows: Sequence[Sequence[int]]) -> tuple[Words, Words]:
    """Hashes of all runs of `SHINGLE` words end to end, and where each row's begin; a shorter row is padded to one run."""
    padded = [row if len(row) >= SHINGLE else [*row, *[0] * (SHINGLE - len(row))] for row in rows]
    lengths = np.fromiter(map(len, padded), np.int64, len(padded))
    words = np.fromiter(chain.from_iterable(padded), np.uint64, int(lengths.sum()))
    count = max(0, len(words) - SHINGLE + 1)
    hashes = np.zeros(count, np.uint64)
    for shift in range(SHINGLE):  # wraps around at 2**64, which is what is wanted
        hashes = (hashes ^ words[shift : shift + count]) * _ODD
        hashes ^= hashes >> np.uint64(29)
    inside = np.ones(len(words), dtype=bool)
    ends = np.cumsum(lengths)
    for back in range(1, SHINGLE):  # runs that would reach into the next row
        inside[ends - back] = False
    offsets = np.concatenate([[0], np.cumsum(lengths - SHINGLE + 1)]).astype(np.uint64)
    return hashes[inside[:count]], offsets


class SignatureFile:
    """Signatures and their bands on disk, because 400 bytes a row do not belong in memory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._rows: BinaryIO = (directory / "signatures").open("w+b")
        self._bands: list[BinaryIO] = [(directory / f"band-{number:02d}").open("w+b") for number in range(BANDS)]

    def append(self, found: Signatures) -> None:
        """Signatures of the next rows."""
        self._rows.write(np.ascontiguousarray(found).tobytes())
        halves = found.reshape(-1, BANDS, PERMUTATIONS // BANDS).astype(np.uint64)
        mixed = np.zeros(halves.shape[:2], np.uint64)
        for position in range(halves.shape[2]):
            mixed = (mixed ^ halves[:, :, position]) * _ODD
            mixed ^= mixed >> np.uint64(31)
        for number, file in enumerate(self._bands):
            file.write(np.ascontiguousarray(mixed[:, number]).tobytes())

    def close(self) -> None:
        """Close all files."""
        for file in (self._rows, *self._bands):
            file.close()

    def partners(self, left: Rows, right: Rows, same: Callable[[Rows, Rows], npt.NDArray[np.bool_]]) -> tuple[Rows, Rows]:
        """Pairs (row of ``left``, row of ``right``) of nearly equal rows, by band of the first few of ``left``; both ascend.

        Where both are the same rows, the first of a pair comes before the second. Pairs for which ``same`` is True are left out.
        """
        pairs = np.empty(0, np.int64)  # both rows in one number
        for file in self._bands:
            file.flush()
            file.seek(0)
            band = np.fromfile(file, np.uint64)
            earlier, later = _meeting(band, left, right)
            wanted = (earlier < later) | ~np.isin(later, left)
            earlier, later = earlier[wanted], later[wanted]
            wanted = ~same(earlier, later)
            pairs = np.union1d(pairs, earlier[wanted] << 32 | later[wanted])
        pairs = pairs[self._similar(pairs >> 32, pairs & _LOW)]
        return pairs >> 32, pairs & _LOW

    def _similar(self, earlier: Rows, later: Rows) -> npt.NDArray[np.bool_]:
        similar = np.zeros(len(earlier), dtype=bool)
        if not len(earlier):
            return similar
        self._rows.flush()
        rows = np.memmap(self._rows, np.uint32, "r").reshape(-1, PERMUTATIONS)
        for start in range(0, len(earlier), _COMPARED):
            part = slice(start, start + _COMPARED)
            similar[part] = np.mean(rows[earlier[part]] == rows[later[part]], axis=1) >= THRESHOLD
        return similar


def _meeting(band: Words, left: Rows, right: Rows) -> tuple[Rows, Rows]:
    """Each row of ``right`` with the first `_FEW` rows of ``left`` that have the same hash: one alone may be less like it than the next."""
    hot = _repeated_values(band[left] if left is right else np.concatenate([band[left], band[right]]))
    left, right = left[_among(band[left], hot)], right[_among(band[right], hot)]
    order = np.argsort(band[left], kind="stable")
    known, wanted = band[left][order], band[right]
    begin, end = np.searchsorted(known, wanted), np.searchsorted(known, wanted, side="right")
    met = [(begin + place)[within] for place in range(_FEW) for within in (begin + place < end,)]
    rows = [right[begin + place < end] for place in range(_FEW)]
    return left[order[np.concatenate(met)]], np.concatenate(rows)


def _repeated_values(values: Words) -> Words:
    """Those that occur more than once: sorting values is ten times as fast as sorting rows by them, and few rows share one."""
    ordered = np.sort(values)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _among(values: Words, known: Words) -> npt.NDArray[np.bool_]:
    """Whether each is one of ``known``, which ascends."""
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    return np.asarray(known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values)


def repeated(earlier: Rows, later: Rows, rows: int) -> npt.NDArray[np.bool_]:
    """(rows,) True for each row that is near an earlier one which is itself not left out."""
    out = np.zeros(rows, dtype=bool)
    for position in np.lexsort((earlier, later)):
        if not out[earlier[position]]:
            out[later[position]] = True
    return out
