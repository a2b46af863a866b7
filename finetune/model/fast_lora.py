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
    layers = [module for module in model.modules() if _is_plain(module)]
    for layer in layers:
        layer.forward = _forward_of(layer, layer.forward)
    return len(layers)


def _is_plain(module: torch.nn.Module) -> bool:
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
    a, b, scale, base = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER], layer.scaling, layer.get_base_layer()

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [_ADAPTER]:
            return otherwise(x, *args, **kwargs)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if dtype != x.dtype and not x.is_floating_point():
            return otherwise(x)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _LoraLinear.apply(x.to(dtype), a.weight, b.weight, base, scale[_ADAPTER])  # type: ignore[no-untyped-call]
        return y

    return forward


class _LoraLinear(torch.autograd.Function):
    """x (..., d_in), A (r, d_in), B (d_out, r) -> (..., d_out) in the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: Any, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        bias = None if base.bias is None else base.bias.to(x.dtype)
        y = functional.linear(rows, _weight(base, x.dtype), bias)
        u = rows @ a.to(x.dtype).T
        y.addmm_(u, b.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(rows, u, a, b)
        ctx.base, ctx.scale, ctx.shape = base, scale, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        rows, u, a, b = ctx.saved_tensors
        dy = gradients[0].reshape(-1, gradients[0].shape[-1])
        v = (dy @ b.to(dy.dtype)).mul_(ctx.scale)
        to_b = (dy.T @ u).to(b.dtype).mul_(ctx.scale)
        to_a = (v.T @ rows).to(a.dtype)
        if not ctx.needs_input_grad[0]:
            return None, to_a, to_b, None, None
        dx = dy @ _weight(ctx.base, dy.dtype)
        dx.addmm_(v, a.to(dy.dtype))
        return dx.view(ctx.shape), to_a, to_b, None, None


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """(d_out, d_in) in ``dtype``; of a 4-bit layer a temporary."""
    if isinstance(base, Linear4bit):
        weight: Tensor = dequantize_4bit(base.weight.data, base.weight.quant_state)
        return weight.to(dtype)
    plain: Tensor = base.weight.to(dtype)
    return plain
