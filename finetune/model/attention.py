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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
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
    rows = [part[0] for part in (query, key, value)]
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
        layout = _layout(bounds)
        rows, keys, values = layout.stacked(query, len(key)).mul_(scale), layout.aligned(key), layout.aligned(value)
        output = torch.empty_like(rows)
        kept: list[Tensor] = []
        for tile in layout.tiles:
            weights = _weights(rows[tile.number], tile.seen(keys))
            torch.bmm(weights, tile.seen(values), out=output[tile.number])
            if tile.keeps:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.bounds = scale, bounds
        return layout.unstacked(output, query.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        layout, found = _layout(ctx.bounds), iter(kept)
        rows, keys, values = layout.stacked(query, len(key)).mul_(ctx.scale), layout.aligned(key), layout.aligned(value)
        upstream = layout.stacked(gradients[0].transpose(0, 1), len(key))
        to_query, to_key, to_value = torch.empty_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
        for tile in layout.tiles:
            own, gradient = rows[tile.number], upstream[tile.number]
            weights = next(found) if tile.keeps else _weights(own, tile.seen(keys))
            tile.seen(to_value).add_(torch.bmm(weights.transpose(1, 2), gradient))
            towards = torch.bmm(gradient, tile.seen(values).transpose(1, 2))
            scores = torch._softmax_backward_data(towards, weights, -1, weights.dtype)
            torch.bmm(scores, tile.seen(keys), out=to_query[tile.number])
            tile.seen(to_key).add_(torch.bmm(scores.transpose(1, 2), own))
        total = query.shape[1]
        back = layout.unstacked(to_query.mul_(ctx.scale), total).transpose(0, 1)
        return back, layout.spread(to_key, total).transpose(0, 1), layout.spread(to_value, total).transpose(0, 1), None, None


@dataclass(frozen=True, slots=True)
class _Tile:
    """`TILE` rows of queries of one example, which see the example up to themselves."""

    number: int
    first: int
    """Aligned row at which the example begins."""
    end: int
    """Aligned row at which the tile ends."""
    keeps: bool
    """Whether its probabilities are kept for the backward pass."""

    def seen(self, aligned: Tensor) -> Tensor:
        """(rows, groups, d) -> (groups, rows up to the tile's end, d)."""
        return aligned[self.first : self.end].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the tokens of a packed row lie when each example begins at a multiple of the tile.

    All products then have one of few shapes and strides, whatever the lengths of the examples: for each new one oneDNN compiles a kernel,
    which takes 1 ms and keeps 0.65 MB. What fills the gaps is zero, is seen by no real query, and gets no gradient.
    """

    index: Tensor
    """(real tokens,) aligned row of each."""
    size: int
    """Aligned rows."""
    tiles: tuple[_Tile, ...]

    def aligned(self, rows: Tensor) -> Tensor:
        """(n, t, d) -> (aligned rows, n, d)."""
        placed = rows.new_zeros(self.size, rows.shape[0], rows.shape[2])
        return placed.index_copy_(0, self.index, rows[:, : len(self.index)].transpose(0, 1))

    def spread(self, aligned: Tensor, total: int) -> Tensor:
        """Inverse of `aligned`, as (total, n, d), zero after the last example."""
        if total == len(self.index):
            return aligned.index_select(0, self.index)
        rows = aligned.new_zeros(total, *aligned.shape[1:])
        rows[: len(self.index)] = aligned.index_select(0, self.index)
        return rows

    def stacked(self, rows: Tensor, groups: int) -> Tensor:
        """(heads, t, d) -> (tiles, groups, heads per group x tile, d): heads that share keys become one product."""
        heads, _, size = rows.shape
        tiles = self.aligned(rows).view(-1, _TILE, groups, heads // groups, size)
        return tiles.permute(0, 2, 3, 1, 4).reshape(len(tiles), groups, -1, size)

    def unstacked(self, tiles: Tensor, total: int) -> Tensor:
        """Inverse of `stacked`, as (total, heads, d)."""
        number, groups, _, size = tiles.shape
        rows = tiles.view(number, groups, -1, _TILE, size).permute(0, 3, 1, 2, 4)
        return self.spread(rows.reshape(self.size, -1, size), total)


@lru_cache(maxsize=4)
def _layout(bounds: tuple[int, ...]) -> _Layout:
    """The layout of examples between ``bounds``; all layers of a micro-batch ask for the same one."""
    pieces, tiles, first = [], [], 0
    for start, end in itertools.pairwise(bounds):
        pieces.append(torch.arange(first, first + end - start))
        last = first + -(-(end - start) // _TILE) * _TILE
        tiles += [_Tile(row // _TILE, first, row + _TILE, end - start <= _KEEP) for row in range(first, last, _TILE)]
        first = last
    return _Layout(torch.cat(pieces), first, tuple(tiles))


def _weights(rows: Tensor, key: Tensor) -> Tensor:
    """softmax(Q K^T) of (groups, n x tile, d) and (groups, seen, d), whose last columns are the tile itself."""
    scores = torch.bmm(rows, key.transpose(1, 2))
    tile = scores.view(key.shape[0], -1, _TILE, key.shape[1])[..., -_TILE:]
    tile.masked_fill_(_above_diagonal(rows.device), float("-inf"))
    return torch.softmax(scores, -1)


@cache
def _above_diagonal(device: torch.device) -> Tensor:
    return torch.ones(_TILE, _TILE, dtype=torch.bool, device=device).triu_(1)
