"""Rows that say nearly the same: MinHash over sequences of five words, and bands of it that bring candidates together.

A. Broder, "On the resemblance and containment of documents", SEQUENCES 1997; banding after Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", chapter 3. 64 permutations in 16 bands of 4 bring nearly every pair of Jaccard similarity 0.8 together; a pair counts
where 80 % of its permutations agree, which is the similarity give or take 0.05. System messages are left out: shared ones would make all
rows alike.
"""

from __future__ import annotations

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
_ODD = np.uint64(0x9E3779B97F4A7C15)


def signatures(records: Sequence[Record]) -> Signatures:
    """MinHash of each record; equal for records with the same sequences of words, whatever their case and spacing."""
    words = [list(map(crc32, _text(record).lower().encode("utf-8", "surrogatepass").split())) for record in records]
    hashes, offsets = _shingles(words)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, _SEED)
    numbers = np.fromiter(chain.from_iterable(matrix.to_rows()), np.uint32, len(records) * PERMUTATIONS)
    return numbers.reshape(len(records), PERMUTATIONS)


def _text(record: Record) -> str:
    if isinstance(record, Text):
        return record.text
    return " ".join([message.content for message in record.messages if message.role != "system"])


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
        """Pairs (row of ``left``, row of ``right``) of nearly equal rows, by band the first of ``left``; both ascend.

        Where both are the same rows, the first of a pair comes before the second. Pairs for which ``same`` is True are left out.
        """
        pairs = np.empty((0, 2), np.int64)
        for file in self._bands:
            file.flush()
            file.seek(0)
            found = _meeting(np.fromfile(file, np.uint64), left, right)
            found = found[(found[:, 0] < found[:, 1]) | ~np.isin(found[:, 1], left)]
            found = found[~same(found[:, 0], found[:, 1])]
            pairs = np.unique(np.concatenate([pairs, found]), axis=0)
        pairs = pairs[self._similar(pairs)]
        return pairs[:, 0], pairs[:, 1]

    def _similar(self, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return np.array([float(np.mean(self._read(int(a)) == self._read(int(b)))) >= THRESHOLD for a, b in pairs], dtype=bool)

    def _read(self, row: int) -> Signatures:
        self._rows.seek(row * PERMUTATIONS * 4)
        return np.frombuffer(self._rows.read(PERMUTATIONS * 4), np.uint32)


def _meeting(band: Words, left: Rows, right: Rows) -> npt.NDArray[np.int64]:
    """(m, 2) each row of ``right`` with the first row of ``left`` that has the same hash."""
    if not len(left) or not len(right):
        return np.empty((0, 2), np.int64)
    known, first = np.unique(band[left], return_index=True)
    wanted = band[right]
    position = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    met = known[position] == wanted
    return np.stack([left[first[position[met]]], right[met]], axis=1)


def repeated(earlier: Rows, later: Rows, rows: int) -> npt.NDArray[np.bool_]:
    """(rows,) True for each row that is near an earlier one which is itself not left out."""
    out = np.zeros(rows, dtype=bool)
    for position in np.lexsort((earlier, later)):
        if not out[earlier[position]]:
            out[later[position]] = True
    return out
