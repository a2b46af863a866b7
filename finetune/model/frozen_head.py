"""Cross-entropy over a frozen output head, whose gradient is taken while the logits exist.

For each chunk of rows h (n, d) with head W (v, d) and targets y (n,)

    z = W h        loss = logsumexp(z) - z_y        d loss / dh = W^T (softmax(z) - onehot(y))

Since W does not train, the last product can be made at once: logits are neither kept nor computed a second time, and memory is that of one
chunk, whatever the vocabulary and the length. Two matrix products instead of the three of recomputation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.model.packing import compiles

ROWS = 128
"""Positions whose logits exist at a time: 66 MB in fp32 for a vocabulary of 128,256."""

_STEP = 32


def fits(head: torch.nn.Module) -> bool:
    """Whether ``head`` is a plain linear without bias that does not train."""
    return type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad


def frozen_head_losses(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    """(n,) fp32 nats of ``targets`` (n,) int64 under hidden (n, d), in the type that autocast or the head asks for."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    with torch.autocast(device, enabled=False):
        losses: Tensor = _FrozenHead.apply(hidden, head.weight, targets, dtype)  # type: ignore[no-untyped-call]
    return losses


def _product(rows: Tensor, weight: Tensor, few: bool) -> Tensor:
    """rows (n, a) by weight (a, b); with ``few`` as one of few shapes, for which kernels were compiled (`packing.compiles`)."""
    missing = -len(rows) % _STEP if few else 0
    return (functional.pad(rows, (0, 0, 0, missing)) @ weight)[: len(rows)] if missing else rows @ weight


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        weight = weight.to(dtype)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        few = compiles(weight)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), ROWS):
            piece = slice(start, start + ROWS)
            logits = _product(hidden[piece].to(dtype), weight.T, few).float()
            total = torch.logsumexp(logits, dim=1)
            at = targets[piece, None]
            losses[piece] = total - logits.gather(1, at).squeeze(1)
            if gradient is not None:
                logits.sub_(total[:, None]).exp_()
                logits.scatter_add_(1, at, -torch.ones_like(at, dtype=torch.float32))
                gradient[piece] = _product(logits.to(dtype), weight, few)
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].unsqueeze(1).to(gradient.dtype), None, None, None
