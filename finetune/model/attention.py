"""Causal attention over examples laid end to end, without padding and without a mask.

On an NVIDIA GPU it is torch's kernel for sequences of varying length (FlashAttention, 2307.08691); on a CPU, which has none, it is ours.

A packed micro-batch is one row of tokens in which examples follow each other. Attention is the only part of a decoder that mixes
positions, so this is the only place that must know where one example ends. Here each example is attended apart, in tiles of query rows
that see nothing above the diagonal, so that neither padding nor a quadratic mask is ever computed.

The gradient is written out (2205.14135, appendix B.2, without the online rescaling): for a tile of queries Q with the keys K and values V
up to it,

    P = softmax(s Q K^T + mask)      O = P V
    dV = P^T dO      dS = P * (dO V^T - rowsum(P * dO V^T))      dQ = s dS K      dK = s dS^T Q
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "finetune_packed"
"""What transformers knows this attention by."""

_TILE = 64
"""Rows of queries that are attended together."""
_TOGETHER = (8, 4, 2, 1)
"""How many examples of a single tile are attended at a time: few sizes, since each is a kernel of its own."""
_KEEP = 256
"""Examples up to this length keep their probabilities for the backward pass; those of longer ones are computed again."""


_NOT_COMPUTED = ("sliding_window", "softcap", "s_aux")
"""What some models ask of attention and this one does not do."""


def packed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention interface of transformers: over one packed row where ``cu_seq_lens_q`` is given, else torch's own.

    Args:
        module: the attention layer.
        query: (1, heads, t, d).
        key: (1, groups, t, d); heads is a multiple of groups.
        value: (1, groups, t, d).
        attention_mask: not read for a packed row.
        kwargs: ``cu_seq_lens_q`` (n + 1,) int32, where each example begins and the end of the last; ``max_length_q``, no less than the
            longest; ``scaling`` s, else 1/sqrt(d).

    Returns:
        (1, t, heads, d), and no weights.

    Raises:
        NotImplementedError: the model asks for a window, a cap, sinks or dropout.
    """
    bounds, longest = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("max_length_q", None)
    if bounds is None:
        output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    asked = [name for name in _NOT_COMPUTED if kwargs.get(name) is not None] + (["dropout"] if kwargs.get("dropout") else [])
    if asked:
        raise NotImplementedError(f"packed attention has no {', '.join(asked)}")
    scaling = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [part.squeeze(0) for part in (query, key, value)]  # part[0] has a gradient that is filled with zeros first
    if torch.is_autocast_enabled(query.device.type):
        # as torch's own: fp32 states of trained embeddings, and what they are mixed with, in the type of the products
        rows = [part.to(torch.get_autocast_dtype(query.device.type)) for part in rows]
    with torch.autocast(query.device.type, enabled=False):
        attended = KERNELS[query.device.type](rows, bounds, longest, scale)
    return attended[None], None


def _in_tiles(rows: list[Tensor], bounds: Tensor, _longest: int, scale: float) -> Tensor:
    attended: Tensor = _Packed.apply(*rows, scale, tuple(bounds.tolist()))  # type: ignore[no-untyped-call]
    return attended


def _in_flash(rows: list[Tensor], bounds: Tensor, longest: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (part.transpose(0, 1) for part in rows)
    shared = key.shape[1] != query.shape[1]
    attended = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=shared)
    assert isinstance(attended, Tensor), "a pair where more is asked for"
    return attended


KERNELS: dict[str, Callable[[list[Tensor], Tensor, int, float], Tensor]] = {"cpu": _in_tiles, "cuda": _in_flash}
"""By kind of device: [Q (heads, t, d), K and V (groups, t, d)], bounds (n + 1,), longest, s -> (t, heads, d)."""


def register() -> None:
    """Tell transformers of `NAME`; padded inputs and generation get the masks of sdpa, as before."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


class _Packed(torch.autograd.Function):
    """Q (heads, t, d), K and V (groups, t, d) -> O (t, heads, d), zero where no example lies."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, bounds: tuple[int, ...]) -> Tensor:
        layout = _layout(bounds, len(query), len(key))
        rows, keys, values = layout.queries.placed(query), layout.keys.placed(key), layout.keys.placed(value)
        output = torch.empty_like(rows)
        kept: list[Tensor] = []
        for piece in layout.pieces:
            weights = _weights(piece.asking(rows), piece.seen(keys), scale)
            torch.bmm(weights, piece.seen(values), out=piece.asking(output))
            if piece.keeps:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.bounds = scale, bounds
        return layout.queries.taken(output, query.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        layout, found = _layout(ctx.bounds, len(query), len(key)), iter(kept)
        rows, keys, values = layout.queries.placed(query), layout.keys.placed(key), layout.keys.placed(value)
        upstream = layout.queries.placed(gradients[0].transpose(0, 1), zeros=True)
        to_query, to_key, to_value = torch.empty_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
        for piece in layout.pieces:
            own, gradient, seen, onto = piece.asking(rows), piece.asking(upstream), piece.seen(keys), piece.asking(to_query)
            weights = next(found) if piece.keeps else _weights(own, seen, ctx.scale)
            piece.seen(to_value).add_(torch.bmm(weights.transpose(1, 2), gradient))
            towards = torch.bmm(gradient, piece.seen(values).transpose(1, 2))
            scores = torch._softmax_backward_data(towards, weights, -1, weights.dtype)
            torch.baddbmm(onto, scores, seen, beta=0, alpha=ctx.scale, out=onto)
            piece.seen(to_key).add_(torch.bmm(scores.transpose(1, 2), own), alpha=ctx.scale)
        total = query.shape[1]
        back = [layout.queries.taken(to_query, total), layout.keys.taken(to_key, total), layout.keys.taken(to_value, total)]
        return *(each.transpose(0, 1) for each in back), None, None  # type: ignore[return-value]


def _weights(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """softmax(s Q K^T) of (n, heads per group x tile, d) and (n, seen, d), whose last keys are the tile itself."""
    mask = _mask(rows.shape[1], -(-keys.shape[1] // _KEEP) * _KEEP, rows.dtype)[:, -keys.shape[1] :]
    return torch.softmax(torch.baddbmm(mask, rows, keys.transpose(1, 2), alpha=scale), -1)


@lru_cache(maxsize=64)
def _mask(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns): zero, and -inf above the diagonal of the last `TILE` columns, once for each `TILE` rows."""
    mask = torch.zeros(rows, columns, dtype=dtype)
    above = torch.full((_TILE, _TILE), float("-inf"), dtype=dtype).triu_(1)
    mask[:, -_TILE:] = above.repeat(rows // _TILE, 1)
    return mask


@dataclass(frozen=True, slots=True)
class _Places:
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
    def of(cls, source: Tensor, real: Tensor, heads: int) -> _Places:
        """Of ``source`` (places,), of which those are no fillers that ``real`` (places,) says."""
        back = torch.empty(int(real.sum()), dtype=torch.int64)
        back[source[real]] = real.nonzero().squeeze(1)
        return cls(source, (~real).nonzero().squeeze(1), back, heads)

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
class _Piece:
    """Tiles of queries that are attended in one product: single tiles of several examples, or one tile of a longer one."""

    queries: slice
    """Places of the queries: (tiles, groups, heads per group x `TILE`)."""
    keys: slice
    """Places of the keys they see: (examples, groups, `TILE`) of single tiles, else (rows up to the tile's end, groups)."""
    groups: int
    single: bool
    keeps: bool
    """Whether the probabilities are kept for the backward pass."""

    def asking(self, places: Tensor) -> Tensor:
        """(examples x groups, heads per group x `TILE`, d)."""
        tiles = (self.keys.stop - self.keys.start) // (_TILE * self.groups) if self.single else 1
        return places[self.queries].view(tiles * self.groups, -1, places.shape[-1])

    def seen(self, places: Tensor) -> Tensor:
        """(examples x groups, rows seen, d)."""
        rows = places[self.keys]
        return rows.view(-1, _TILE, rows.shape[-1]) if self.single else rows.view(-1, self.groups, rows.shape[-1]).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where queries and keys lie in tiles, and what is attended together.

    All products have one of few shapes and strides, whatever the lengths of the examples: for each new one oneDNN compiles a kernel,
    which takes 1 ms and keeps 0.65 MB.
    """

    queries: _Places
    keys: _Places
    pieces: tuple[_Piece, ...]


@lru_cache(maxsize=8)
def _layout(bounds: tuple[int, ...], heads: int, groups: int) -> _Layout:
    """The layout of examples between ``bounds``, those of a single tile first; all layers of a micro-batch ask for the same one."""
    examples = list(itertools.pairwise(bounds))
    short = [(start, end) for start, end in examples if end - start <= _TILE]
    long = [(start, end) for start, end in examples if end - start > _TILE]
    rows = [torch.arange(start, start + -(-(end - start) // _TILE) * _TILE) for start, end in (*short, *long)]
    tokens = torch.cat([row.clamp_max(end - 1) for row, (_, end) in zip(rows, (*short, *long), strict=True)]).view(-1, _TILE)
    real = torch.cat([row < end for row, (_, end) in zip(rows, (*short, *long), strict=True)]).view(-1, _TILE)
    by_head, by_group = torch.arange(heads)[None, :, None], torch.arange(groups)[None, :, None]

    def places(single: Tensor, several: Tensor) -> Tensor:
        return torch.cat([single.flatten(), several.transpose(1, 2).flatten()])

    numbers = tokens[:, None] * groups + by_group
    shown = real[:, None].expand(-1, groups, -1)
    first = len(short)
    return _Layout(
        _Places.of((tokens[:, None] * heads + by_head).flatten(), real[:, None].expand(-1, heads, -1).flatten(), heads),
        _Places.of(places(numbers[:first], numbers[first:]), places(shown[:first], shown[first:]), groups),
        (*_single(first, heads, groups), *_tiled(first, [end - start for start, end in long], heads, groups)),
    )


def _single(count: int, heads: int, groups: int) -> Iterator[_Piece]:
    done = 0
    while done < count:
        end = done + next(size for size in _TOGETHER if size <= count - done)
        queries, keys = (slice(done * n * _TILE, end * n * _TILE) for n in (heads, groups))
        yield _Piece(queries, keys, groups, single=True, keeps=True)
        done = end


def _tiled(first: int, lengths: list[int], heads: int, groups: int) -> Iterator[_Piece]:
    """Of examples of ``lengths``, the first of which has tile number ``first``."""
    for length in lengths:
        last = first + -(-length // _TILE)
        for tile in range(first, last):
            queries = slice(tile * heads * _TILE, (tile + 1) * heads * _TILE)
            yield _Piece(queries, slice(first * groups * _TILE, (tile + 1) * groups * _TILE), groups, single=False, keeps=length <= _KEEP)
        first = last
