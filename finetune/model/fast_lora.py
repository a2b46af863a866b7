"""LoRA's linear layer as one function: y = Wx + s BAx with a gradient that keeps x and Ax alone.

PEFT's forward casts x to the adapter's fp32, saves both copies, and adds and scales in passes of their own. This one multiplies in the
type of the computation, accumulates in place, and for a quantized W dequantizes again in the backward pass instead of keeping it.

    forward    u = A x                    y = W x + b + s B u
    backward   v = s B^T dy               dx = W^T dy + A^T v      dB = s dy u^T      dA = v x^T

PEFT stays the owner of the modules: `install` replaces the forward of those that are plain (no dropout in training, no DoRA, one adapter)
and calls PEFT's own wherever the state is another one, such as a disabled adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor
from torch.nn import functional

_ADAPTER = "default"


def install(model: torch.nn.Module) -> int:
    """Give every plain LoRA linear of ``model`` the function; returns how many have it."""
    layers = [module for module in model.modules() if is_plain(module)]
    for layer in layers:
        layer.forward = _forward_of(layer, layer.forward)
    return len(layers)


def is_plain(module: torch.nn.Module) -> bool:
    """Whether ``module`` is a LoRA linear that the function can stand for."""
    if type(module) not in (LoraLinear, LoraLinear4bit):
        return False
    layer: Any = module
    base = layer.get_base_layer()
    return (
        list(layer.lora_A) == [_ADAPTER]
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[_ADAPTER], torch.nn.Identity)
        and layer.lora_A[_ADAPTER].bias is None
        and layer.lora_B[_ADAPTER].bias is None
        and type(base) in (torch.nn.Linear, Linear4bit)
        and not base.weight.requires_grad
    )


def _forward_of(layer: Any, otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not is_active(layer) or not x.is_floating_point():
            return otherwise(x, *args, **kwargs)
        a, b, product = parts_of(layer)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _LoraLinear.apply(x.to(compute_dtype(x)), a, b, product)  # type: ignore[no-untyped-call]
        return y

    return forward


def is_active(layer: Any) -> bool:
    """Whether a plain LoRA linear is in the state that the function computes: one adapter, on, and not merged."""
    return not layer.disable_adapters and not layer.merged and layer.active_adapters == [_ADAPTER]


def parts_of(layer: Any) -> tuple[Tensor, Tensor, Product]:
    """A (r, d_in), B (d_out, r), and the rest of a plain LoRA linear."""
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight, Product(layer.get_base_layer(), layer.scaling[_ADAPTER])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that products with ``x`` are made in."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


@dataclass(frozen=True, slots=True)
class Product:
    """y = W x + b + s B A x over rows, and its gradients."""

    base: Any
    """Holds W (d_out, d_in), maybe in 4 bits, and b."""
    scale: float

    def forward(self, rows: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """rows (n, d_in) -> y (n, d_out), u = A x (n, r), which `backward` wants again."""
        bias = None if self.base.bias is None else self.base.bias.to(rows.dtype)
        y = functional.linear(rows, _weight(self.base, rows.dtype), bias)
        u = rows @ a.to(rows.dtype).T
        return y.addmm_(u, b.to(rows.dtype).T, alpha=self.scale), u

    def backward(self, dy: Tensor, rows: Tensor, u: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v (n, r), dA and dB of dy (n, d_out)."""
        v = (dy @ b.to(dy.dtype)).mul_(self.scale)
        # u^T dy and not dy^T u: with the long side last, a product takes a third of the time
        return v, (v.T @ rows).to(a.dtype), (u.T @ dy).T.to(b.dtype).mul_(self.scale)

    def to_rows(self, dy: Tensor, v: Tensor, a: Tensor, onto: Tensor | None = None) -> Tensor:
        """dx (n, d_in), added to ``onto`` where that is given."""
        weight = _weight(self.base, dy.dtype)
        dx = dy @ weight if onto is None else onto.addmm_(dy, weight)
        return dx.addmm_(v, a.to(dy.dtype))


class _LoraLinear(torch.autograd.Function):
    """x (..., d_in), A (r, d_in), B (d_out, r) -> (..., d_out) in the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, product: Product) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, u = product.forward(rows, a, b)
        ctx.save_for_backward(rows, u, a, b)
        ctx.product, ctx.shape = product, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        rows, u, a, b = ctx.saved_tensors
        dy = gradients[0].reshape(-1, gradients[0].shape[-1])
        v, to_a, to_b = ctx.product.backward(dy, rows, u, a, b)
        dx = ctx.product.to_rows(dy, v, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, to_a, to_b, None


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """(d_out, d_in) in ``dtype``; of a 4-bit layer a temporary."""
    if isinstance(base, Linear4bit):
        weight: Tensor = dequantize_4bit(base.weight.data, base.weight.quant_state)
        return weight.to(dtype)
    plain: Tensor = base.weight.to(dtype)
    return plain
