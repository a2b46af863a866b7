"""The model as it was before training: what a gain is measured from.

Switching an adapter off is that model only where the adapter started at zero. A LoftQ adapter did not: its start corrects the quantization,
and without it the base is worse than the model that training began with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from finetune.errors import VerificationError
from finetune.model.adapters import switched_off
from finetune.model.correction import FILE, Corrections, Factors
from finetune.model.quantize import dequantized, is_quantized

_ADAPTER = "default"
_SWITCHED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
"""What PEFT puts in the place of a module: a LoRA layer, or a wrapper around a copy that trains as a whole."""


@contextmanager
def before_training(model: Any, adapter_dir: Path, *, loftq: bool) -> Iterator[None]:
    """Inside the block, ``model`` computes what it did before its first step; afterwards it is as it was.

    ``loftq``: the run's `tuning.init` was LoftQ, so that ``adapter_dir`` holds the start.
    """
    if not loftq:
        with switched_off(model):
            yield
        return
    layers = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, _SWITCHED)}
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with Corrections(adapter_dir) as corrections, ExitStack() as undo:
        absent = sorted(corrections.modules - set(layers))
        if absent:
            raise VerificationError(f"the model has no adapter on {absent[0]}", where=str(adapter_dir / FILE))
        for name, layer in layers.items():
            if name in corrections.modules:
                undo.enter_context(_started(layer, corrections.read(name).start))
            else:
                layer.enable_adapters(False)
                undo.callback(layer.enable_adapters, True)
        try:
            yield
        finally:
            undo.close()
            # PEFT's switches set requires_grad as a side effect
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)


@contextmanager
def _started(layer: Any, start: Factors) -> Iterator[None]:
    """The layer with the factors it started from, and DoRA's magnitude that goes with them."""
    magnitudes = getattr(layer, "lora_magnitude_vector", None) or {}
    live = [layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight]
    values = [start.a, start.b]
    if _ADAPTER in magnitudes:
        base = layer.get_base_layer()
        live.append(magnitudes[_ADAPTER].weight)
        values.append(start.added_to(dequantized(base) if is_quantized(base) else base.weight).norm(dim=1))
    saved = [part.detach().clone() for part in live]
    _copy(live, values)
    try:
        yield
    finally:
        _copy(live, saved)


@torch.no_grad()
def _copy(parts: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    for part, value in zip(parts, values, strict=True):
        part.copy_(value)
