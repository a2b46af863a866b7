"""Starts that are drawn, or read off the training data: orthogonal factors, and EVA's principal directions of each layer's input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from finetune.model.head import backbone, causal_model
from finetune.model.lora import ADAPTER, lora_layers
from finetune.model.low_rank import truncated_svd

_EXTRA = 16
"""Directions kept beyond the rank while batches are added, so that what one batch cuts off another can still bring back."""


@torch.no_grad()
def draw_orthogonal(model: Any) -> None:
    """Start every LoRA of ``model`` at A, B != 0 with BA = 0: half of the r inner directions serve A, the other half B.

    A = (X Q_odd)^T / 10 and B = Y Q_even / 10 with Gaussian X (d_in, r/2), Y (d_out, r/2) and the rows of an orthogonal (r, r) matrix Q
    dealt to both. PEFT has this start, but rounds it to the type of the base, so that BA is not zero on bf16 and fails on 4 bits. Uses
    torch's global random state. Ranks are even (`lora_config` saw to it).
    """
    for layer in lora_layers(model).values():
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        rank = a.shape[0]
        q = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))[0]
        left = torch.randn(a.shape[1], rank // 2, dtype=torch.float64) @ q[0::2] / 10
        right = torch.randn(b.shape[0], rank // 2, dtype=torch.float64) @ q[1::2] / 10
        a.copy_(left.T)
        b.copy_(right)


@torch.no_grad()
def apply_eva(model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Start A of every LoRA of ``model`` as the r main directions of its layer's input on ``batches``, B = 0 (EVA, 2410.07170).

    The directions are the right singular vectors of all inputs stacked, found batch by batch: the singular values and vectors kept so
    far are stacked on the next batch's inputs and decomposed again, so that memory does not grow with the data. Ranks stay as they are
    configured (the paper's rho = 1). LoRA on embeddings, and on experts that none of the tokens reached, keeps its default start.

    Args:
        model: a PEFT model; it is put into eval mode while it runs, with its fresh adapter, which changes nothing.
        batches: (ids, attention) of (b, t) int64; positions with attention 0 are left out.
    """
    layers = lora_layers(model)
    directions = _Directions(layers)
    core = causal_model(model)
    training = model.training
    model.eval()
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(directions.watching(name)).remove)
        for ids, attention in batches:
            directions.attention = attention.bool()
            backbone(core)(input_ids=ids, attention_mask=attention, use_cache=False)
            directions.forget_inputs()
    model.train(training)
    for name in directions.seen:
        layer = layers[name]
        a = layer.lora_A[ADAPTER].weight
        a.copy_(_completed(directions.of(name)[: a.shape[0]], a.shape[0]))
        layer.lora_B[ADAPTER].weight.zero_()


class _Directions:
    """The main directions of the inputs of each layer; layers that read the same tensor, such as q, k and v, share them."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.attention = torch.empty(0)
        self._ranks = {name: layer.lora_A[ADAPTER].weight.shape[0] for name, layer in layers.items()}
        self._leaders: dict[str, str] = {}
        self._sketches: dict[str, Tensor] = {}
        self._last: tuple[Tensor, str] | None = None

    def watching(self, name: str) -> Any:
        """A forward pre-hook for the layer ``name``."""

        def look(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._last is None or args[0] is not self._last[0]:
                self._last = (args[0], name)
                # experts are given the tokens that were sent to them, in one row
                rows = args[0][self.attention] if args[0].ndim == self.attention.ndim + 1 else args[0]
                self._add(name, rows.float())
            self._leaders[name] = self._last[1]

        return look

    @property
    def seen(self) -> list[str]:
        """Layers that were given anything."""
        return list(self._leaders)

    def _add(self, leader: str, inputs: Tensor) -> None:
        """Stack ``inputs`` (n, d_in) under what is known, and keep the main directions of both."""
        known = self._sketches.get(leader)
        stacked = inputs if known is None else torch.cat([known, inputs])
        _, sigma, v = truncated_svd(stacked, max(self._ranks.values()) + _EXTRA)
        self._sketches[leader] = sigma[:, None] * v

    def forget_inputs(self) -> None:
        """Let go of the last batch's activations."""
        self._last = None

    def of(self, name: str) -> Tensor:
        """Orthonormal rows (k, d_in), main direction first."""
        sketch = self._sketches[self._leaders[name]]
        unit: Tensor = sketch / sketch.norm(dim=1, keepdim=True).clamp_min(torch.finfo(sketch.dtype).tiny)
        return unit


def _completed(rows: Tensor, rank: int) -> Tensor:
    """``rows`` (k, d), orthonormal, with further orthonormal rows up to ``rank`` where there were fewer tokens than that, then zeros.

    A zero row of A with B = 0 would never train; beyond d_in directions there is none left to take.
    """
    known = rows[rows.norm(dim=1) > 0.5]
    missing = min(rank, rows.shape[1]) - known.shape[0]
    if missing > 0:
        drawn = torch.randn(missing, rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
        drawn -= drawn @ known.T @ known
        known = torch.cat([known, torch.linalg.qr(drawn.T)[0].T])
    return torch.cat([known, known.new_zeros(rank - known.shape[0], rows.shape[1])])
