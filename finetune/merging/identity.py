"""Whether merged files hold the weights of a live adapter model, compared tensor by tensor.

Logits in bf16 are noisy: two right merges of a short run lie 0.01 nats apart. The weights are not. This comparison takes the base from the
live model's own memory and the update from PEFT's own formula, so it also notices a base that was rebuilt wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.ia3 import IA3Layer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.vera.layer import VeraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor

from finetune.errors import VerificationError
from finetune.model.bias import TrainedBias
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
            error = float(difference.norm() / live.float().norm().clamp_min(1e-30))
            if not error <= _TOLERANCE[written.dtype]:
                raise VerificationError(
                    f"{name} differs from the adapter model's weight by {error:.2g} of its norm",
                    where=str(directory),
                    fix="merge with the base model, quantization and dtype of the run",
                )
            worst = max(worst, error)
    return worst


def _live_weights(model: Any, compute_dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name in the merged model and value of everything the adapter touches."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    copies: set[int] = set()
    for name, module in core.named_modules():
        whole = _whole_copies(module)
        for part, value in whole.items():
            if value.data_ptr() not in copies:  # a tied pair that trained as one is written once
                copies.add(value.data_ptr())
                yield f"{name}.{part}", value
        match module:
            case LoraLayer() | VeraLayer():
                yield f"{name}.weight", _updated(module, compute_dtype)
            case IA3Layer():
                yield from ((f"{name}.{part}", value) for part, value in _scaled(module, compute_dtype).items())
            case TrainableTokensWrapper() if module.token_adapter.tied_adapter is None:
                yield f"{name}.weight", module.token_adapter.get_merged_weights([_ADAPTER])
            case TrainedBias():
                yield f"{name.rpartition('.')[0]}.bias", module.bias


def _whole_copies(module: Any) -> dict[str, Tensor]:
    """The trained copies of a module's own tensors."""
    found: dict[str, Tensor] = {}
    if isinstance(module, LNTuningLayer):
        found = module.ln_tuning_layers[_ADAPTER].state_dict()
    elif isinstance(module, ModulesToSaveWrapper) and _ADAPTER in module.modules_to_save:
        found = module.modules_to_save[_ADAPTER].state_dict()
    return found


def _base_weight(layer: Any, compute_dtype: torch.dtype) -> Tensor:
    """What the layer's base multiplies by, fp32."""
    base = layer.get_base_layer()
    values: Tensor = dequantized(base).to(compute_dtype) if is_quantized(base) else base.weight
    return values.float()


def _updated(layer: Any, compute_dtype: torch.dtype) -> Tensor:
    """What a layer with a LoRA, AdaLoRA or VeRA multiplies by, by PEFT's formula where it has one."""
    with _in_fp32(layer):
        total = _base_weight(layer, compute_dtype) + _update(layer)
    magnitudes = getattr(layer, "lora_magnitude_vector", None)
    if magnitudes is not None and _ADAPTER in magnitudes:
        along = 0 if _ADAPTER in layer.lora_embedding_A else 1
        norms = total.norm(dim=along, keepdim=True)
        total = total * (magnitudes[_ADAPTER].weight.float().reshape(norms.shape) / norms)
    return total


def _update(layer: Any) -> Tensor:
    """What the adapter adds to the weight, by PEFT's formula; its own code for it where that is exact."""
    delta: Tensor
    if isinstance(layer, AdaLoraLayer):
        # PEFT's 4-bit layer can compute its update only together with its input
        factors = layer.lora_B[_ADAPTER] @ (layer.lora_A[_ADAPTER] * layer.lora_E[_ADAPTER])
        delta = factors * layer.scaling[_ADAPTER] / (layer.ranknum[_ADAPTER] + 1e-5)
    elif isinstance(layer, VeraLayer):
        # PEFT rounds to the type of its projections
        a, b = layer.vera_A[_ADAPTER][:, : layer.in_features].float(), layer.vera_B[_ADAPTER][: layer.out_features].float()
        delta = (layer.vera_lambda_b[_ADAPTER][:, None] * b) @ (layer.vera_lambda_d[_ADAPTER][:, None] * a)
    else:
        delta = layer.get_delta_weight(_ADAPTER)
    return delta


@contextmanager
def _in_fp32(layer: Any) -> Iterator[None]:
    """Inside the block the adapter's tensors in ``layer`` are fp32: PEFT rounds an update to the type of its factors."""
    adapter = [parameter for name, parameter in layer.named_parameters() if name.startswith(("lora_", "vera_", "ranknum"))]
    stored = [parameter.data for parameter in adapter]
    for parameter in adapter:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, data in zip(adapter, stored, strict=True):
            parameter.data = data


def _scaled(layer: Any, compute_dtype: torch.dtype) -> dict[str, Tensor]:
    """Weight and, where outputs are scaled, bias of a layer with IA3."""
    scales, bias = layer.ia3_l[_ADAPTER].float(), getattr(layer.get_base_layer(), "bias", None)
    found = {"weight": _base_weight(layer, compute_dtype) * scales}
    return found if layer.is_feedforward or bias is None else found | {"bias": bias.float() * scales[:, 0]}
