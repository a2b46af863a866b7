"""Examples that lie on disk: a memory-mapped Arrow table, or another store of them, and an array of row numbers into it.

Columns of the table: ``ids`` list of int32 tokens, ``mask`` list of bool (True where the token carries loss), ``where`` string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune.data.render import Example

SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("mask", pa.list_(pa.bool_())), ("where", pa.string())])

Ints = npt.NDArray[np.int32]  # (n,)
Rows = npt.NDArray[np.int64]  # (n,) row numbers of a table


class Store(Protocol):
    """Numbered examples, each read when it is asked for."""

    def example(self, row: int) -> Example:
        """The example in ``row``."""

    def where(self, row: int) -> str:
        """The place that ``row`` came from."""


class Examples(Sequence[Example]):
    """Examples in their order, read when they are asked for. A slice is a view on the same file."""

    def __init__(self, table: Store, rows: Rows, lengths: Ints, supervised: Ints) -> None:
        self._table = table
        self._rows = rows
        self.lengths = lengths
        """(n,) tokens of each example."""
        self.supervised = supervised
        """(n,) tokens of each example that carry loss."""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """``examples`` in memory."""
        flat = Flat.of(examples)
        table = Table([flat.record_batch([example.where for example in examples])])
        return cls(table, np.arange(len(examples), dtype=np.int64), np.diff(flat.offsets), flat.supervised())

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self._table, self._rows[index], self.lengths[index], self.supervised[index])
        return self._table.example(int(self._rows[index]))

    def where(self, index: int) -> str:
        """The place of one example, without reading its tokens."""
        return self._table.where(int(self._rows[index]))


class Table:
    """Record batches of `SCHEMA` with random access."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def example(self, row: int) -> Example:
        """The example in ``row``."""
        batch, position = self._find(row)
        ids, mask = _values(batch, 0, position), _values(batch, 1, position)
        return Example(tuple(ids.to_pylist()), tuple(mask.to_pylist()), batch.column(2)[position].as_py())

    def where(self, row: int) -> str:
        """The place that ``row`` came from."""
        batch, position = self._find(row)
        return str(batch.column(2)[position].as_py())

    def _find(self, row: int) -> tuple[Any, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[number], row - int(self._starts[number])


def _values(batch: Any, column: int, position: int) -> Any:
    return batch.column(column)[position].values


@dataclass(frozen=True, slots=True)
class Flat:
    """Examples end to end."""

    ids: Ints  # (t,) of all examples
    mask: npt.NDArray[np.bool_]  # (t,)
    offsets: Ints  # (n + 1,) where each begins, and the end

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Flat:
        """``examples`` as arrays."""
        offsets = np.zeros(len(examples) + 1, np.int32)  # a batch or a validation set: far under 2**31 tokens
        np.cumsum([len(example.ids) for example in examples], out=offsets[1:])
        ids = np.fromiter(chain.from_iterable([example.ids for example in examples]), np.int32, int(offsets[-1]))
        mask = np.frombuffer(b"".join([bytes(example.mask) for example in examples]), np.bool_)
        return cls(ids, mask, offsets)

    def supervised(self) -> Ints:
        """(n,) tokens of each example that carry loss."""
        totals = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int32)])
        return np.diff(totals[self.offsets]).astype(np.int32)

    def record_batch(self, where: Sequence[str]) -> Any:
        """A `pyarrow.RecordBatch` of `SCHEMA`."""
        columns = [pa.ListArray.from_arrays(pa.array(self.offsets), pa.array(values)) for values in (self.ids, self.mask)]
        return pa.RecordBatch.from_arrays([*columns, pa.array(where, pa.string())], schema=SCHEMA)


def open_table(path: Path) -> Table:
    """The Arrow IPC file at ``path``, mapped: what is not asked for is not read."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return Table([reader.get_batch(number) for number in range(reader.num_record_batches)])
