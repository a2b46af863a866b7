"""A gated MLP with LoRA as one function: it keeps x, the gate's and the up projection's output, and nothing that follows from them.

    g = gate(x)    u = up(x)    y = down(silu(g) * u)                          gate, up, down: W x + s B A x

The library keeps silu(g), and silu(g) * u for the gradient of down's A, besides: four tensors of the width of the MLP, which is most of
what a decoder keeps. Here both are computed again in the backward pass, by two elementwise passes, and the three gradients that flow
into x are added up inside the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.model.fast_lora import Product, compute_dtype, is_active, is_plain, parts_of

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_TOLERANCE = 1e-5
"""Relative difference of outputs in fp32 that rounding explains; another activation is off by far more."""


def install(model: torch.nn.Module) -> int:
    """Give the function to every MLP of ``model`` that a probe finds to be this one; returns how many have it. After fast_lora."""
    found = [module for module in model.modules() if _is_gated(module) and _is_this(module)]
    for module in found:
        module.forward = _forward_of(module, module.forward)
    return len(found)


def _is_gated(module: torch.nn.Module) -> bool:
    return sorted(name for name, _ in module.named_children() if name != "act_fn") == sorted(_PROJECTIONS) and all(
        is_plain(getattr(module, name)) for name in _PROJECTIONS
    )


@torch.no_grad()
def _is_this(module: Any) -> bool:
    """The module's own formula, with its products replaced by ones of four numbers, against ours."""
    seen: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(0)
    before = {name: getattr(module, name).forward for name in _PROJECTIONS}

    def stand_in(name: str) -> Callable[[Tensor], Tensor]:
        def project(x: Tensor) -> Tensor:
            seen[name] = x
            return 3.0 * torch.randn(4, 8, generator=draw)

        return project

    x = torch.randn(4, 8, generator=draw)
    try:
        for name in _PROJECTIONS:
            getattr(module, name).forward = stand_in(name)
        module(x)
    except (TypeError, ValueError, RuntimeError):  # a forward that wants something else: another kind of module
        return False
    finally:
        for name, forward in before.items():
            getattr(module, name).forward = forward
    if seen.keys() != set(_PROJECTIONS) or seen["gate_proj"] is not x or seen["up_proj"] is not x:
        return False
    again = torch.Generator().manual_seed(0)
    torch.randn(4, 8, generator=again)
    drawn = {name: 3.0 * torch.randn(4, 8, generator=again) for name in seen}
    expected = functional.silu(drawn["gate_proj"]) * drawn["up_proj"]
    return bool((seen["down_proj"] - expected).norm() <= _TOLERANCE * expected.norm())


def _forward_of(module: Any, otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    layers = [getattr(module, name) for name in _PROJECTIONS]

    def forward(x: Tensor) -> Tensor:
        if not all(is_active(layer) for layer in layers):
            return otherwise(x)
        (gate_a, gate_b, gate), (up_a, up_b, up), (down_a, down_b, down) = (parts_of(layer) for layer in layers)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _GatedMlp.apply(  # type: ignore[no-untyped-call]
                x.to(compute_dtype(x)), gate_a, gate_b, up_a, up_b, down_a, down_b, (gate, up, down)
            )
        return y

    return forward


class _GatedMlp(torch.autograd.Function):
    """x (..., d) -> (..., d) in the type of x, over A and B of gate, up and down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        gate_a, gate_b, up_a, up_b, down_a, down_b, (gate, up, down) = rest
        rows = x.reshape(-1, x.shape[-1])
        g, thin_g = gate.forward(rows, gate_a, gate_b)
        u, thin_u = up.forward(rows, up_a, up_b)
        y, thin_y = down.forward(functional.silu(g).mul_(u), down_a, down_b)
        ctx.save_for_backward(rows, g, u, thin_g, thin_u, thin_y, gate_a, gate_b, up_a, up_b, down_a, down_b)
        ctx.products, ctx.shape = (gate, up, down), x.shape
        out: Tensor = y.view(x.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, g, u, thin_g, thin_u, thin_y, gate_a, gate_b, up_a, up_b, down_a, down_b = ctx.saved_tensors
        products: tuple[Product, Product, Product] = ctx.products
        gate, up, down = products
        dy = gradients[0].reshape(rows.shape)
        silu = functional.silu(g)
        v, to_down_a, to_down_b = down.backward(dy, silu * u, thin_y, down_a, down_b)
        dh = down.to_rows(dy, v, down_a)
        du = silu.mul_(dh)
        dg = torch.ops.aten.silu_backward(dh.mul_(u), g)
        v_g, to_gate_a, to_gate_b = gate.backward(dg, rows, thin_g, gate_a, gate_b)
        v_u, to_up_a, to_up_b = up.backward(du, rows, thin_u, up_a, up_b)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = up.to_rows(du, v_u, up_a, onto=gate.to_rows(dg, v_g, gate_a)).view(ctx.shape)
        return dx, to_gate_a, to_gate_b, to_up_a, to_up_b, to_down_a, to_down_b, None
