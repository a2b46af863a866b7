"""Cross-entropy over a frozen output head, whose gradient is taken while the logits exist.

For each chunk of rows h (n, d) with head W (v, d) and targets y (n,)

    z = W h        loss = logsumexp(z) - z_y        d loss / dh = W^T (softmax(z) - onehot(y))

Since W does not train, the last product can be made at once: logits are neither kept nor computed a second time, and memory is that of one
chunk, whatever the vocabulary and the length. Two matrix products instead of the three of recomputation.

What lies between the products is computed in fp32 on a few rows at a time, which stay in a core's cache, and written over the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.model.packing import compiles

ROWS = 256
"""Positions whose logits exist at a time, at most: 66 MB in bf16 for a vocabulary of 128,256."""
_BLOCK, _BLOCK_ON_CPU = 128, 32
"""How many of them are in fp32 at a time: 66 MB for that vocabulary, 16 MB on a CPU."""

_STEP = 32
"""Rows of a product are a multiple of it where a kernel is compiled for each number (`packing.compiles`)."""


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


def _chunk(rows: int) -> int:
    """Rows of a chunk, when all are to be about as large: a small last one takes half as long again for each of its rows."""
    chunks = max(1, -(-rows // ROWS))
    return max(1, min(ROWS, -(-rows // (chunks * _STEP)) * _STEP))


def _to_gradient(logits: Tensor, targets: Tensor, losses: Tensor) -> None:
    """Set ``losses`` (n,) of ``logits`` z (n, v) and ``targets`` (n, 1), and z itself to softmax(z) - onehot(y)."""
    wide = logits.float()  # itself, where it is fp32
    at_target, top = wide.gather(1, targets), wide.amax(1, keepdim=True)
    total = wide.sub_(top).exp_().sum(1, keepdim=True)
    losses.copy_((total.log() + top - at_target).squeeze(1))
    wide.div_(total).scatter_add_(1, targets, torch.full_like(at_target, -1.0))
    if wide is not logits:
        logits.copy_(wide)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        weight = weight.to(dtype)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        few, block = compiles(weight), _BLOCK_ON_CPU if hidden.device.type == "cpu" else _BLOCK
        size = _chunk(len(hidden))
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            rows = hidden[chunk].to(dtype)
            count = len(rows)
            logits = (functional.pad(rows, (0, 0, 0, -count % _STEP)) if few else rows) @ weight.T
            for part in zip(*(torch.split(each, block) for each in (logits[:count], targets[chunk, None], losses[chunk])), strict=True):
                _to_gradient(*part)
            if gradient is not None:
                gradient[chunk] = (logits @ weight)[:count]
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].unsqueeze(1).to(gradient.dtype), None, None, None
