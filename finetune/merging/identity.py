"""Whether merged files hold the weights of a live adapter model, compared tensor by tensor.

Logits in bf16 are noisy: two right merges of a short run lie 0.01 nats apart. The weights are not. This comparison takes the base from the
live model's own memory and the update from PEFT's own formula, so it also notices a base that was rebuilt wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import VerificationError
from finetune.model.quantize import dequantized, is_quantized
from finetune.model.weights import Weights

_ADAPTER = "default"
_TOLERANCE = {torch.bfloat16: 2e-4, torch.float16: 1e-4, torch.float32: 1e-5}
"""Relative error of a matrix against the live one in the same type: the rare elements that another order of sums rounds the other way.
The update of a short run is 1e-3 of its weight and more, so one that is missing or doubled is noticed."""


@torch.no_grad()
def require_identity(model: Any, directory: Path, compute_dtype: torch.dtype) -> float:
    """Largest relative error ||written - rounded live|| / ||live|| over the tensors that the adapter of ``model`` touches.

    ``directory`` is merged onto the dequantized base. VerificationError where the error of one exceeds the rounding of its type.
    """
    worst = 0.0
    with Weights.of_model(directory) as weights:
        for name, live in _live_weights(model, compute_dtype):
            written = weights.read(name)
            difference = written.to(live.device).float() - live.to(written.dtype).float()
            error = float(difference.norm() / live.norm().clamp_min(1e-30))
            if not error <= _TOLERANCE[written.dtype]:
                raise VerificationError(
                    f"{name} differs from the adapter model's weight by {error:.2g} of its norm",
                    where=str(directory),
                    fix="merge with the base model, quantization and dtype of the run",
                )
            worst = max(worst, error)
    return worst


def _live_weights(model: Any, compute_dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name in the merged model and value, fp32, of everything the adapter touches."""
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight") and _ADAPTER in module.scaling:
            yield f"{name}.weight", _effective(module, compute_dtype)
        elif _ADAPTER in getattr(module, "modules_to_save", {}):
            for part, tensor in module.modules_to_save[_ADAPTER].state_dict().items():
                yield f"{name}.{part}", tensor.float()


def _effective(layer: Any, compute_dtype: torch.dtype) -> Tensor:
    """What a LoRA layer multiplies by."""
    base = layer.get_base_layer()
    values = dequantized(base).to(compute_dtype) if is_quantized(base) else base.weight
    total: Tensor = values.float() + layer.get_delta_weight(_ADAPTER).float()
    magnitudes = layer.lora_magnitude_vector
    if magnitudes is not None and _ADAPTER in magnitudes:
        along = 0 if _ADAPTER in layer.lora_embedding_A else 1
        norms = total.norm(dim=along, keepdim=True)
        total = total * (magnitudes[_ADAPTER].weight.float().reshape(norms.shape) / norms)
    return total
