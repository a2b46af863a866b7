"""Whether merged files hold the weights of a live adapter model: tensor by tensor, at random rows.

Logits in bf16 are noisy: two right merges of a short run lie 0.01 nats apart. The weights are not. This comparison takes the base from the
live model's own memory and the update from PEFT's own formula, so it also notices a base that was rebuilt wrongly. The
rows are taken while the model lives and compared when it is gone, so that it and the merged model are never in memory together.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from finetune.merging.rounding import Rounding, rounded_rows
from finetune.model.bias import TrainedBias
from finetune.model.quantize import dequantized, is_quantized
from finetune.model.weights import Weights

_ADAPTER = "default"
_TOLERANCE = {torch.bfloat16: 2e-4, torch.float16: 1e-4, torch.float32: 1e-5}
"""Relative error of a matrix against the live one in the same type: the rare elements that another order of sums rounds the other way.
The update of a short run is 1e-3 of its weight and more, so one that is missing or doubled is noticed."""

_BYTES = 1 << 20
"""Bytes of a weight, in fp32, that are compared."""
_FEWEST_ROWS, _MOST_ROWS = 8, 64


@dataclass(frozen=True, slots=True)
class LiveRows:
    """Rows of a weight that the adapter of a live model touches, kept when the model is gone."""

    name: str
    """Of the weight in the merged model."""
    places: Tensor
    """(n,) int64: which rows"""
    values: Tensor
    """(n, ...) on the CPU, in the type that the model holds them in: fp32 where a product of factors is added"""


@torch.no_grad()
def live_rows(model: Any, compute_dtype: torch.dtype) -> tuple[LiveRows, ...]:
    """Rows of everything that the adapter of ``model`` touches: the whole of small tensors, a random choice of 8 to 64 rows of others
    (and all rows that were trained as rows). At most 1 MiB a tensor, so that a 70B model takes half a gigabyte."""
    found = []
    for name, value, trained in _live_weights(model, compute_dtype):
        places = _chosen(name, value, trained).to(value.device)
        found.append(LiveRows(name, places.cpu(), value[places].cpu().clone()))
    return tuple(found)


def _chosen(name: str, value: Tensor, trained: Sequence[int]) -> Tensor:
    """(n,) int64: the rows of ``value`` that are compared, among them those ``trained``."""
    count = len(value)
    if value.numel() * 4 <= _BYTES or value.ndim == 1:
        return torch.arange(count)
    kept = max(_FEWEST_ROWS, min(_MOST_ROWS, _BYTES // (4 * value[0].numel())))
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))[:kept]
    return torch.tensor(sorted({*drawn.tolist(), *trained}), dtype=torch.int64)


@torch.no_grad()
def require_rows(rows: Iterable[LiveRows], directory: Path, rounding: Rounding = "nearest", seed: int = 0) -> float:
    """Largest relative error ||written - rounded live|| / ||live|| over the ``rows`` of each tensor.

    ``directory`` is merged onto the dequantized base with that ``rounding``. VerificationError where the error of one exceeds the rounding
    of its type.
    """
    worst = 0.0
    with Weights.of_model(directory) as weights:
        for live in rows:
            written = weights.read(live.name)[live.places]
            expected = rounded_rows(live.values, live.places, written.dtype, live.name, rounding, seed)
            error = float((written.float() - expected.float()).norm() / live.values.float().norm().clamp_min(1e-30))
            if not error <= _TOLERANCE[written.dtype]:
                raise VerificationError(
                    f"{live.name} differs from the adapter model's weight by {error:.2g} of its norm",
                    where=str(directory),
                    fix="merge with the base model, quantization and dtype of the run",
                )
            worst = max(worst, error)
    return worst


def require_identity(model: Any, directory: Path, compute_dtype: torch.dtype) -> float:
    """`require_rows` of a live ``model``."""
    return require_rows(live_rows(model, compute_dtype), directory)


def _live_weights(model: Any, compute_dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Sequence[int]]]:
    """Name in the merged model and value of everything the adapter touches, and the rows of it that were trained apart from the others."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    copies: set[int] = set()
    for name, module in core.named_modules():
        whole = _whole_copies(module)
        for part, value in whole.items():
            if value.data_ptr() not in copies:  # a tied pair that trained as one is written once
                copies.add(value.data_ptr())
                yield f"{name}.{part}", value, ()
        match module:
            case LoraLayer() | VeraLayer():
                yield f"{name}.weight", _updated(module, compute_dtype), ()
            case IA3Layer():
                yield from ((f"{name}.{part}", value, ()) for part, value in _scaled(module, compute_dtype).items())
            case TrainableTokensWrapper() if module.token_adapter.tied_adapter is None:
                trained = module.token_adapter
                yield f"{name}.weight", trained.get_merged_weights([_ADAPTER]), trained.token_indices[_ADAPTER]
            case TrainedBias():
                yield f"{name.rpartition('.')[0]}.bias", module.bias, ()


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
