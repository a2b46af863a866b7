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

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune.model.tiles import KEEP, TILE, Seen, layout_of

NAME = "finetune_packed"
"""What transformers knows this attention by."""

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
        layout = layout_of(bounds, len(query), len(key))
        rows, keys, values = layout.asking(query), layout.seen(key), layout.seen(value)
        output = torch.empty_like(rows)
        kept: list[Tensor] = []
        for piece in layout.pieces:
            weights = _weights(piece.asking(rows), piece.seen(keys), scale)
            torch.bmm(weights, piece.seen(values), out=piece.asking(output))
            if piece.keeps:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.bounds = scale, bounds
        return layout.queries.taken(output.flatten(0, 1), query.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        layout, found = layout_of(ctx.bounds, len(query), len(key)), iter(kept)
        rows, keys, values = layout.asking(query), layout.seen(key), layout.seen(value)
        upstream = layout.asking(gradients[0].transpose(0, 1), zeros=True)
        to_query, to_keys, to_values = torch.empty_like(rows), Seen.zeros_like(keys), Seen.zeros_like(values)
        for piece in layout.pieces:
            own, gradient, seen, onto = piece.asking(rows), piece.asking(upstream), piece.seen(keys), piece.asking(to_query)
            weights = next(found) if piece.keeps else _weights(own, seen, ctx.scale)
            piece.seen(to_values).add_(torch.bmm(weights.transpose(1, 2), gradient))
            towards = torch.bmm(gradient, piece.seen(values).transpose(1, 2))
            scores = torch._softmax_backward_data(towards, weights, -1, weights.dtype)
            torch.baddbmm(onto, scores, seen, beta=0, alpha=ctx.scale, out=onto)
            piece.seen(to_keys).add_(torch.bmm(scores.transpose(1, 2), own), alpha=ctx.scale)
        total = query.shape[1]
        places = layout.queries, layout.keys, layout.keys
        found_places = to_query.flatten(0, 1), to_keys.places, to_values.places
        back = [where.taken(each, total).transpose(0, 1) for where, each in zip(places, found_places, strict=True)]
        return back[0], back[1], back[2], None, None


def _weights(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """softmax(s Q K^T) of (n, heads per group x tile, d) and (n, seen, d), whose last keys are the tile itself."""
    mask, seen = _mask(rows.shape[1], rows.dtype), keys.shape[1]
    if seen <= KEEP:  # in the product itself: a pass less over the scores
        return torch.softmax(torch.baddbmm(mask[:, -seen:], rows, keys.transpose(1, 2), alpha=scale), -1)
    scores = torch.baddbmm(mask.new_empty(1), rows, keys.transpose(1, 2), beta=0, alpha=scale)
    scores[..., -TILE:].add_(mask[:, -TILE:])
    return torch.softmax(scores, -1)


@lru_cache(maxsize=8)
def _mask(rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, `KEEP`): zero, and -inf above the diagonal of the last `TILE` columns, once for each `TILE` rows."""
    mask = torch.zeros(rows, KEEP, dtype=dtype)
    mask[:, -TILE:] = torch.full((TILE, TILE), float("-inf"), dtype=dtype).triu_(1).repeat(rows // TILE, 1)
    return mask
