"""Tokenized rows in a file of the run, so that evaluation and merging need neither the data nor the split again.

They are read when they are asked for: of rows that lie in the file, only where each begins and how many of its tokens carry loss is held.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from finetune.data.examples import Examples, Flat, Ints, Rows
from finetune.data.render import Example
from finetune.errors import VerificationError

_PROBE_ROWS = 64
_COUNTED = 512  # rows whose masks are held at once while they are counted


def save_rows(path: Path, train: Examples, validation: Examples) -> None:
    """Write the validation rows, or where there are none the first training rows, by which a merge can still be checked."""
    rows = validation or train[:_PROBE_ROWS]
    flat = Flat.of(rows)
    tensors: dict[str, npt.NDArray[Any]] = {"ids": flat.ids, "mask": flat.mask.astype(np.uint8), "lengths": np.diff(flat.offsets)}
    save_file(tensors, path, {"kind": "validation" if validation else "training"})


def load_rows(path: Path) -> tuple[Examples, bool]:
    """The rows, and whether they are validation rows; VerificationError where the file is missing or damaged, now or when a row is read."""
    try:
        with safe_open(path, "np") as file:  # also checks that header and size of the file agree
            kind = (file.metadata() or {})["kind"]
            lengths = file.get_tensor("lengths")
            tokens = {name: file.get_slice(name).get_shape() for name in ("ids", "mask")}
        starts = _starts(path)
    except (OSError, SafetensorError, KeyError) as error:
        raise _damaged(str(error), path) from error
    if not ((lengths > 0).all() and all(shape == [lengths.sum()] for shape in tokens.values())):
        raise _damaged("the lengths of the rows are not those of their tokens", path)
    stored = _Stored(path, kind, starts, lengths)
    return Examples(stored, np.arange(len(lengths), dtype=np.int64), lengths, stored.supervised()), kind == "validation"


class _Stored:
    """The rows in the file, each read when it is asked for. Not mapped: pages of a mapped file count as the memory of the process."""

    def __init__(self, path: Path, kind: str, starts: dict[str, int], lengths: Ints) -> None:
        """``starts``: of each tensor, the byte of the file at which it begins."""
        self._path, self._kind, self._starts = path, kind, starts
        self._offsets: Rows = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def example(self, row: int) -> Example:
        """The example in ``row``; VerificationError where the file has become shorter."""
        ids, mask = self._read("ids", np.int32, row, row + 1), self._read("mask", np.bool_, row, row + 1)
        return Example(tuple(ids.tolist()), tuple(mask.tolist()), self.where(row))

    def where(self, row: int) -> str:
        """What ``row`` is called; where it came from is not kept."""
        return f"{self._kind} row {row + 1}"

    def supervised(self) -> Ints:
        """(n,) tokens of each row that carry loss."""
        counts = np.zeros(len(self._offsets) - 1, np.int32)
        for first in range(0, len(counts), _COUNTED):
            end = min(first + _COUNTED, len(counts))
            begins = self._offsets[first:end] - self._offsets[first]
            counts[first:end] = np.add.reduceat(self._read("mask", np.bool_, first, end), begins, dtype=np.int32)
        return counts

    def _read(self, name: str, dtype: type[np.generic], first: int, end: int) -> npt.NDArray[Any]:
        """(t,) what ``name`` has for the rows ``first`` to ``end``."""
        begin, count = int(self._offsets[first]), int(self._offsets[end] - self._offsets[first])
        try:
            found = np.fromfile(self._path, dtype, count, offset=self._starts[name] + begin * np.dtype(dtype).itemsize)
        except OSError as error:
            raise _damaged(str(error), self._path) from error
        if len(found) < count:
            raise _damaged("it ends too early", self._path)
        return found


def _starts(path: Path) -> dict[str, int]:
    """The byte of the safetensors file ``path`` at which each tensor begins: 8 bytes of the header's length, the header, then tensors."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + header[name]["data_offsets"][0] for name in ("ids", "mask")}


def _damaged(what: str, path: Path) -> VerificationError:
    return VerificationError(f"cannot read the run's rows: {what}", where=str(path), fix="restore the file, or train again")
