"""Where the rows of packed examples lie while they are attended on a CPU: in tiles, each example beginning at one of its own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[Any]

TILE = 64
"""Rows of queries that are attended together."""
_TOGETHER = (8, 4, 2, 1)
"""How many examples of a single tile are attended at a time: few sizes, since each is a kernel of its own."""
KEEP = 256
"""Examples up to this length keep their probabilities for the backward pass; those of longer ones are computed again."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where each row of (t, n, d) lies when every example begins at a tile of its own, and back: one copy, whatever the order.

    What fills a tile up repeats a row of its example; no real query sees it, and it gets no gradient.
    """

    source: Tensor
    """(places,): the row, of t n, that lies there."""
    fillers: Tensor
    """Places that repeat a row."""
    back: Tensor
    """(real tokens x n,): the place at which a row lies."""
    heads: int
    """n."""

    @classmethod
    def of(cls, source: Rows, real: Rows, heads: int) -> Places:
        """Of ``source`` (places,), of which those are no fillers that ``real`` (places,) says."""
        own = np.flatnonzero(real)
        back = np.empty_like(own)
        back[source[own]] = own
        return cls(torch.from_numpy(source), torch.from_numpy(np.flatnonzero(~real)), torch.from_numpy(back), heads)

    def placed(self, rows: Tensor, *, zeros: bool = False) -> Tensor:
        """(n, t, d) -> (places, d); with ``zeros``, fillers are zero."""
        found = rows.transpose(0, 1).reshape(-1, rows.shape[-1]).index_select(0, self.source)
        return found.index_fill_(0, self.fillers, 0) if zeros else found

    def taken(self, places: Tensor, total: int) -> Tensor:
        """Inverse of `placed`, as (total, n, d), zero after the last example."""
        rows = places.new_empty(total * self.heads, places.shape[-1])
        torch.index_select(places, 0, self.back, out=rows[: len(self.back)])
        rows[len(self.back) :].zero_()
        return rows.view(total, self.heads, -1)


@dataclass(frozen=True, slots=True)
class Seen:
    """Keys or values in their places, of examples of a single tile and of longer ones: views of one tensor."""

    places: Tensor
    """(places, d)."""
    single: Tensor
    """(examples x groups, `TILE`, d)."""
    several: Tensor
    """(groups, rows, d)."""

    @classmethod
    def of(cls, places: Tensor, single: int, groups: int) -> Seen:
        """``single``: how many examples of a single tile there are."""
        end, size = single * groups * TILE, places.shape[-1]
        return cls(places, places[:end].view(-1, TILE, size), places[end:].view(-1, groups, size).transpose(0, 1))

    @classmethod
    def zeros_like(cls, other: Seen) -> Seen:
        """Zero in the same places."""
        groups = len(other.several)
        return cls.of(torch.zeros_like(other.places), len(other.single) // groups, groups)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tiles of queries that are attended in one product: single tiles of several examples, or one tile of a longer one."""

    queries: slice
    """Of (tiles x groups)."""
    keys: slice
    """Of (examples x groups) of single tiles, else of the rows of longer examples: up to the tile's end."""
    single: bool
    keeps: bool
    """Whether the probabilities are kept for the backward pass."""

    def asking(self, rows: Tensor) -> Tensor:
        """(tiles x groups, heads per group x `TILE`, d) -> the piece's own."""
        return rows[self.queries]

    def seen(self, rows: Seen) -> Tensor:
        """(examples x groups, rows seen, d)."""
        return rows.single[self.keys] if self.single else rows.several[:, self.keys]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where queries and keys lie in tiles, and what is attended together.

    All products have one of few shapes and strides, whatever the lengths of the examples: for each new one oneDNN compiles a kernel,
    which takes 1 ms and keeps 0.65 MB.
    """

    queries: Places
    """Tile by tile, of each the heads."""
    keys: Places
    """Of single tiles by example and group, of longer examples by row and group."""
    single: int
    """How many examples have a single tile."""
    pieces: tuple[Piece, ...]

    def asking(self, rows: Tensor, *, zeros: bool = False) -> Tensor:
        """(heads, t, d) -> (tiles x groups, heads per group x `TILE`, d): heads that share keys become one product."""
        placed = self.queries.placed(rows, zeros=zeros)
        return placed.view(-1, self.queries.heads // self.keys.heads * TILE, placed.shape[-1])

    def seen(self, rows: Tensor) -> Seen:
        """Of (groups, t, d)."""
        return Seen.of(self.keys.placed(rows), self.single, self.keys.heads)


class _Recent(threading.local):
    """Of each thread, which computes one micro-batch at a time: the layouts of the last one, by heads and groups."""

    bounds: tuple[int, ...] = ()
    layouts: dict[tuple[int, int], Layout]


_recent = _Recent()


def layout_of(bounds: tuple[int, ...], heads: int, groups: int) -> Layout:
    """The layout of examples between ``bounds``; all layers of a micro-batch ask for the same one."""
    if _recent.bounds != bounds:
        _recent.bounds, _recent.layouts = bounds, {}
    if (heads, groups) not in _recent.layouts:
        _recent.layouts[heads, groups] = _layout(bounds, heads, groups)
    return _recent.layouts[heads, groups]


def _layout(bounds: tuple[int, ...], heads: int, groups: int) -> Layout:
    """Those of a single tile first."""
    examples = [(start, end) for start, end in itertools.pairwise(bounds) if end > start]
    short = [(start, end) for start, end in examples if end - start <= TILE]
    long = [(start, end) for start, end in examples if end - start > TILE]
    ordered = [*short, *long]
    rows = [np.arange(start, start + -(-(end - start) // TILE) * TILE) for start, end in ordered]
    tokens = np.concatenate([row.clip(max=end - 1) for row, (_, end) in zip(rows, ordered, strict=True)]).reshape(-1, TILE)
    real = np.concatenate([row < end for row, (_, end) in zip(rows, ordered, strict=True)]).reshape(-1, TILE)
    first = len(short)

    def numbered(count: int) -> Rows:
        return tokens[:, None] * count + np.arange(count)[:, None]

    def shown(count: int) -> Rows:
        return real[:, None].repeat(count, 1)

    def by_row(places: Rows) -> Rows:
        return np.concatenate([places[:first].ravel(), places[first:].swapaxes(1, 2).ravel()])

    return Layout(
        Places.of(numbered(heads).ravel(), shown(heads).ravel(), heads),
        Places.of(by_row(numbered(groups)), by_row(shown(groups)), groups),
        first,
        (*_single(first, groups), *_tiled(first, [end - start for start, end in long], groups)),
    )


def _single(count: int, groups: int) -> Iterator[Piece]:
    done = 0
    while done < count:
        end = done + next(size for size in _TOGETHER if size <= count - done)
        together = slice(done * groups, end * groups)
        yield Piece(together, together, single=True, keeps=True)
        done = end


def _tiled(first: int, lengths: list[int], groups: int) -> Iterator[Piece]:
    """Of examples of ``lengths``, the first of which has tile number ``first``."""
    tile, row = first, 0
    for length in lengths:
        for end in range(row + TILE, row + length + TILE, TILE):
            yield Piece(slice(tile * groups, (tile + 1) * groups), slice(row, end), single=False, keeps=length <= KEEP)
            tile += 1
        row += -(-length // TILE) * TILE
