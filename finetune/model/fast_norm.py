"""RMSNorm with a frozen weight as one function: it keeps its input and one number a row.

    y = w x / r,  r = sqrt(mean(x^2) + e)        dx = (w dy - x mean(w dy x) / r^2) / r          (1910.07467, equation 4)

The libraries' version casts to fp32, squares, averages, scales and casts back in passes of their own, and keeps three fp32 copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_EPSILONS = ("variance_epsilon", "eps")
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative difference that rounding explains; a norm of another kind, such as one with weight 1 + w, is off by far more."""


def install(model: torch.nn.Module) -> int:
    """Give the function to every norm of ``model`` that a probe finds to be this one; returns how many have it."""
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm") and _is_this(module)]
    for module in norms:
        module.forward = _forward_of(module)
    return len(norms)


def _epsilon(module: torch.nn.Module) -> float | None:
    return next((float(getattr(module, name)) for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)


@torch.no_grad()
def _is_this(module: Any) -> bool:
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if epsilon is None or weight is None or weight.ndim != 1 or weight.requires_grad or weight.dtype not in _TOLERANCE:
        return False
    if [name for name, _ in module.named_parameters()] != ["weight"] or weight.is_meta:
        return False
    draw = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1.0], [10.0], [100.0]])
    x = draw.to(weight)
    expected, found = module(x), _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    return bool(((expected - found).float().norm(dim=1) <= _TOLERANCE[weight.dtype] * expected.float().norm(dim=1)).all())


def _forward_of(module: Any) -> Any:
    epsilon = _epsilon(module)
    otherwise = module.forward

    def forward(hidden_states: Tensor) -> Tensor:
        weight = module.weight
        if hidden_states.dtype != weight.dtype or weight.requires_grad:
            return otherwise(hidden_states)  # type: ignore[no-any-return]
        return _RmsNorm.apply(hidden_states, weight, epsilon)  # type: ignore[no-untyped-call, no-any-return]

    return forward


class _RmsNorm(torch.autograd.Function):
    """x (..., d), w (d,) -> (..., d), all of one type; sums are fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse = torch.rsqrt(square.div_(x.shape[-1]).add_(epsilon))
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x, inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        scaled = gradients[0] * weight
        along = torch.linalg.vecdot(scaled, x).unsqueeze(-1).float()
        factor = along.mul_(inverse.pow(3)).div_(x.shape[-1])
        return scaled.mul_(inverse.to(x.dtype)).addcmul_(x, factor.to(x.dtype), value=-1), None, None
