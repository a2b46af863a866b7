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
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "finetune_packed"
"""What transformers knows this attention by."""

_TILE = 64
_KEEP = 512
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
    attended: Tensor = _Packed.apply(*rows, scale, bounds.tolist())  # type: ignore[no-untyped-call]
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
    """Q (heads, t, d), K and V (groups, t, d) -> O (t, heads, d)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, bounds: list[int]) -> Tensor:
        heads, total, size = query.shape
        output = query.new_empty(total, heads, size)
        kept: list[Tensor] = []
        for start, end in itertools.pairwise(bounds):
            for low, high in _tiles(start, end):
                weights = _weights(_stacked(query, key, low, high), key[:, start:high], scale, high - low)
                output[low:high] = _unstacked(torch.bmm(weights, value[:, start:high]), heads, high - low)
                if end - start <= _KEEP:
                    kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.bounds = scale, bounds
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        gradient = gradients[0].transpose(0, 1)  # (heads, t, d)
        query, key, value, *kept = ctx.saved_tensors
        heads = query.shape[0]
        found = iter(kept)
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for start, end in itertools.pairwise(ctx.bounds):
            for low, high in _tiles(start, end):
                seen = slice(start, high)
                rows, upstream = _stacked(query, key, low, high), _stacked(gradient, key, low, high)
                weights = next(found) if end - start <= _KEEP else _weights(rows, key[:, seen], ctx.scale, high - low)
                to_value[:, seen].baddbmm_(weights.transpose(1, 2), upstream)
                scores = torch._softmax_backward_data(torch.bmm(upstream, value[:, seen].transpose(1, 2)), weights, -1, weights.dtype)
                to_query[:, low:high] = _unstacked(torch.bmm(scores, key[:, seen]).mul_(ctx.scale), heads, high - low).transpose(0, 1)
                to_key[:, seen].baddbmm_(scores.transpose(1, 2), rows, alpha=ctx.scale)
        return to_query, to_key, to_value, None, None


def _tiles(start: int, end: int) -> list[tuple[int, int]]:
    return [(low, min(low + _TILE, end)) for low in range(start, end, _TILE)]


def _stacked(rows: Tensor, key: Tensor, low: int, high: int) -> Tensor:
    """Rows low..high of (heads, t, d) as (groups, heads per group x (high - low), d): heads that share keys become one product."""
    return rows[:, low:high].reshape(key.shape[0], -1, rows.shape[-1])


def _unstacked(rows: Tensor, heads: int, length: int) -> Tensor:
    """Inverse of `_stacked`, as (length, heads, d)."""
    return rows.view(heads, length, rows.shape[-1]).transpose(0, 1)


def _weights(rows: Tensor, key: Tensor, scale: float, length: int) -> Tensor:
    """softmax(s Q K^T) of (groups, n x length, d) and (groups, seen, d), whose last ``length`` columns are the tile itself."""
    scores = torch.bmm(rows, key.transpose(1, 2)).mul_(scale)
    tile = scores.view(key.shape[0], -1, length, key.shape[1])[..., -length:]
    tile.masked_fill_(_above_diagonal(length, rows.device), float("-inf"))
    return torch.softmax(scores, -1)


def _above_diagonal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)
