"""BitFit (2106.10199): the biases train, and nothing else.

A bias trains as an fp32 copy beside its module, whose own bias is zero meanwhile: a bf16 bias would lose small updates, and bitsandbytes
casts the bias of a 4-bit layer down to the type of its input whenever it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finetune.errors import ConfigError
from finetune.model.methods import norm_parameters
from finetune.model.parts import Part


class TrainedBias(Part):
    """The bias of a module, trained, and the one it had."""

    original: Tensor

    def __init__(self, original: Tensor) -> None:
        """Starts as ``original`` (d_out,)."""
        super().__init__()
        self.bias = nn.Parameter(original.detach().float().clone())
        self.register_buffer("original", original.detach().clone(), persistent=False)

    def changed(self, output: Tensor) -> Tensor:
        """``output`` (..., d_out) of the module without a bias, and the bias."""
        return output + (self.bias if self.enabled else self.original).to(output.dtype)


def add_biases(model: Any) -> None:
    """Freeze ``model`` and let its biases train; ConfigError where it has none, or one that is more than a summand of the output."""
    model.requires_grad_(False)
    found = {name: module for name, module in model.named_modules() if isinstance(getattr(module, "bias", None), nn.Parameter)}
    if not found:
        raise ConfigError(
            "this model has no biases to train",
            where="tuning.method",
            fix=f"use `method: norm`, which trains the scales of its normalization layers ({norm_parameters(model):,} parameters)",
        )
    odd = [name for name, module in found.items() if not isinstance(module, nn.Linear | Conv1D | nn.LayerNorm)]
    if odd:
        raise ConfigError(
            f"the bias of {odd[0]} ({type(found[odd[0]]).__name__}) cannot be trained by itself",
            where="tuning.method",
            fix="use `method: norm`",
        )
    for module in found.values():
        original: Any = module.bias
        TrainedBias(original).place(module, "bitfit")
        module.bias = nn.Parameter(torch.zeros_like(original), requires_grad=False)
