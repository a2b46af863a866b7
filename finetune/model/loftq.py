"""LoftQ (2310.08659): start an adapter so that quantized base plus adapter is close to the original weight.

Alternates, for t = 1..T with B_0 A_0 = 0 (algorithm 1 of the paper),

    Q_t       = quantize(W - s B_{t-1} A_{t-1})
    A_t, B_t  = rank-r SVD of W - Q_t:  s B_t A_t ~ W - Q_t

The paper has s = 1. The model multiplies BA by s = alpha/r or alpha/sqrt(r), so the factors are divided by s here: an uncorrected start
gains nothing at s = 2 and doubles the error at s = 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config.schema import EightBit, FourBit, LoftqInit, Lora, Quantization
from finetune.errors import ConfigError, VerificationError
from finetune.model.correction import FILE, Corrections, Factors, ModuleCorrection, save_corrections
from finetune.model.quantize import QuantizedWeight, is_quantized, quantize_weight, replace_weight
from finetune.model.weights import Weights

_ADAPTER = "default"
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_RANDOMIZED_SHARE = 8
"""The randomized SVD serves where (rank + oversampling) is at most this fraction of the smaller side; see `low_rank`."""


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How the base was quantized."""

    quantization: FourBit | EightBit
    compute_dtype: torch.dtype

    def __call__(self, weight: Tensor) -> QuantizedWeight:
        """Quantize ``weight`` (d_out, d_in) on its device."""
        return quantize_weight(weight, self.quantization, self.compute_dtype)


@dataclass(frozen=True, slots=True)
class Decomposition:
    """What LoftQ makes of one weight."""

    quantized: QuantizedWeight
    """Q_T"""
    correction: ModuleCorrection
    """A_T, B_T and, for T > 1, A_{T-1}, B_{T-1}"""
    before: float
    """||W - Q_1|| / ||W||"""
    after: float
    """||W - Q_T - s B_T A_T|| / ||W||"""


@dataclass(frozen=True, slots=True)
class LayerError:
    """Relative quantization error of one type of layer, mean over the model."""

    before: float
    """||W - Q|| / ||W|| of the plain quantization"""
    after: float
    """||W - Q - sBA|| / ||W||"""
    modules: int


@dataclass(frozen=True, slots=True)
class LoftqReport:
    """What LoftQ gained, and what merging and evaluation need to rebuild the base."""

    layers: Mapping[str, LayerError]
    """By type of layer, such as `q_proj`."""
    corrections: Mapping[str, ModuleCorrection]
    """By module name, on the CPU. Pass them to `save_base_correction` with every saved adapter."""


def low_rank(matrix: Tensor, rank: int, *, exact: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors B (d_out, rank), A (rank, d_in) of the best rank-``rank`` approximation of ``matrix`` (d_out, d_in) fp32.

    Each carries the square root of the singular values. A rank above min(d_out, d_in) is filled up with zeros, so that the factors have
    the shapes that the adapter's configuration promises. Where the rank is small against the matrix the range is found by seeded
    subspace iteration (Halko et al., 0909.4061, algorithm 4.4) instead of a full SVD; measured on NF4 residuals it leaves at most 0.6 %
    more error than the exact one. ``exact`` forces the full SVD.
    """
    d_out, d_in = matrix.shape
    kept = min(rank, d_out, d_in)
    if not exact and (rank + _OVERSAMPLING) * _RANDOMIZED_SHARE <= min(d_out, d_in):
        basis = _range(matrix, rank + _OVERSAMPLING, seed)
        u, sigma, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    else:
        u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    root = sigma[:kept].sqrt()
    b, a = matrix.new_zeros(d_out, rank), matrix.new_zeros(rank, d_in)
    b[:, :kept] = u[:, :kept] * root
    a[:kept] = root[:, None] * v[:kept]
    return b, a


def _range(matrix: Tensor, columns: int, seed: int) -> Tensor:
    """Orthonormal basis (d_out, columns) of the dominant range of ``matrix``, drawn on the CPU so that every device gets the same."""
    draw = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(seed))
    basis: Tensor = torch.linalg.qr(matrix @ draw.to(matrix))[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    return basis


def decompose(weight: Tensor, quantizer: Quantizer, rank: int, scale: float, iterations: int = 1) -> Decomposition:
    """LoftQ of one ``weight`` (d_out, d_in) with the scale ``scale`` > 0 of its adapter, in fp32 on the weight's device."""
    original = weight.float()
    norm = float(original.norm())
    quantized = quantizer(original)
    before = _relative(original - quantized.values, norm)
    base: Factors | None = None
    start = _residual(original, quantized, rank, scale)
    for _ in range(iterations - 1):
        base = start
        quantized = quantizer(base.added_to(original, -1.0))
        start = _residual(original, quantized, rank, scale)
    after = _relative(start.added_to(quantized.values - original), norm)
    return Decomposition(quantized, ModuleCorrection(start, base), before, after)


def _residual(original: Tensor, quantized: QuantizedWeight, rank: int, scale: float) -> Factors:
    b, a = low_rank(original - quantized.values, rank)
    return Factors(a, b / scale, scale)


def _relative(difference: Tensor, norm: float) -> float:
    return float(difference.norm()) / norm if norm else 0.0


def apply_loftq(
    model: Any, base_dir: Path, tuning: Lora, quantizer: Quantizer, progress: Callable[[int, int], None] | None = None
) -> LoftqReport:
    """Overwrite the fresh adapter "default" of ``model`` (a PEFT model on a quantized base) by LoftQ's start, layer by layer.

    The original weights are read from the safetensors of ``base_dir`` one at a time. With more than one iteration the quantized weights
    are replaced as well. DoRA magnitudes become the row norms of Q + sBA, as PEFT defines them at the start. LoRA on embeddings and on
    unquantized layers keeps its default start, where it changes nothing. ``progress`` is called with (done, of).

    Raises ConfigError where no target is quantized, VerificationError where the base's files are not the model's.
    """
    if not isinstance(tuning.init, LoftqInit):
        raise ConfigError("LoftQ was asked for without its section", where="tuning.init", fix="set tuning.init: {method: loftq}")
    targets = _quantized_targets(model)
    if not targets:
        raise ConfigError(
            "LoftQ corrects quantized layers, and none of the targets is quantized",
            where="tuning.init",
            fix="set quantization: {method: nf4}",
        )
    corrections: dict[str, ModuleCorrection] = {}
    errors: dict[str, list[tuple[float, float]]] = {}
    with Weights.of_model(base_dir) as weights:
        for done, (name, layer) in enumerate(targets.items(), start=1):
            found = _initialize(layer, weights.read(f"{name}.weight"), quantizer, tuning.init.iterations)
            corrections[name] = _on_cpu(found.correction)
            errors.setdefault(name.rpartition(".")[2], []).append((found.before, found.after))
            if progress:
                progress(done, len(targets))
    return LoftqReport({kind: _mean(pairs) for kind, pairs in errors.items()}, corrections)


def _quantized_targets(model: Any) -> dict[str, Any]:
    """PEFT's LoRA layers over quantized modules by the name of the module in the base model."""
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "base_layer") and _ADAPTER in getattr(module, "lora_A", {}) and is_quantized(module.get_base_layer())
    }


@torch.no_grad()
def _initialize(layer: Any, weight: Tensor, quantizer: Quantizer, iterations: int) -> Decomposition:
    a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    found = decompose(weight.to(a.device), quantizer, a.shape[0], layer.scaling[_ADAPTER], iterations)
    start = found.correction.start
    if a.shape != start.a.shape or b.shape != start.b.shape:
        raise VerificationError(f"the base's weight has the shape {tuple(weight.shape)}, which is not the model's", fix="check model.id")
    a.copy_(start.a)
    b.copy_(start.b)
    if found.correction.base is not None:
        replace_weight(layer.get_base_layer(), found.quantized)
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    if _ADAPTER in magnitudes:
        # DoRA's magnitude starts as the norm of the weight it multiplies, so that the start is Q + sBA and not a rescaled one
        magnitudes[_ADAPTER].weight.copy_(start.added_to(found.quantized.values).norm(dim=1))
    return found


def _on_cpu(correction: ModuleCorrection) -> ModuleCorrection:
    def moved(factors: Factors) -> Factors:
        return Factors(factors.a.cpu(), factors.b.cpu(), factors.scale)

    return ModuleCorrection(moved(correction.start), moved(correction.base) if correction.base else None)


def _mean(pairs: list[tuple[float, float]]) -> LayerError:
    return LayerError(sum(before for before, _ in pairs) / len(pairs), sum(after for _, after in pairs) / len(pairs), len(pairs))


def save_base_correction(adapter_dir: Path, report: LoftqReport) -> Path:
    """Write `loftq_base.safetensors` into ``adapter_dir``; without it the adapter's base cannot be rebuilt."""
    return save_corrections(adapter_dir, report.corrections)


def restore_base(model: nn.Module, adapter_dir: Path, base_dir: Path, quantization: Quantization, compute_dtype: torch.dtype) -> int:
    """Give a freshly quantized ``model`` (with or without its adapter) the base that the adapter in ``adapter_dir`` was trained on.

    Call it where the run's `tuning.init` is LoftQ, before the first forward. Does nothing after one iteration, where the base is the
    plain quantization. Returns the number of replaced weights. VerificationError: `loftq_base.safetensors` is missing or does not fit.
    """
    outer: Any = model
    core = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    replaced = 0
    with Corrections(adapter_dir) as corrections, Weights.of_model(base_dir) as weights:
        for name in sorted(corrections.modules):
            base = corrections.read(name).base
            if base is None:
                continue
            if not isinstance(quantization, FourBit | EightBit):
                raise VerificationError(
                    "the adapter needs a quantized base", where=str(adapter_dir / FILE), fix="load the base as the run did"
                )
            try:
                module = core.get_submodule(name)
            except AttributeError as error:
                raise VerificationError(f"the model has no module {name}", where=str(adapter_dir / FILE)) from error
            linear = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            source = weights.read(f"{name}.weight").to(linear.weight.device)
            replace_weight(linear, Quantizer(quantization, compute_dtype)(base.added_to(source, -1.0)))
            replaced += 1
    return replaced
