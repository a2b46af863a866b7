"""LoftQ (2310.08659): start an adapter so that quantized base plus adapter is close to the original weight.

Alternates, for t = 1..T with B_0 A_0 = 0 (algorithm 1 of the paper),

    Q_t       = quantize(W - s B_{t-1} A_{t-1})
    A_t, B_t  = rank-r SVD of W - Q_t:  s B_t A_t ~ W - Q_t

The paper has s = 1. The model multiplies BA by s = alpha/r or alpha/sqrt(r), so the factors are divided by s here: an uncorrected start
gains nothing at s = 2 and doubles the error at s = 4.

Quantizes as the base is: NF4, FP4 (each with or without double quantization) and int8.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config.schema import EightBit, FourBit, LoftqInit, Lora, Quantization
from finetune.errors import ConfigError, VerificationError
from finetune.model.computed_start import Computed, Progress, StartReport, apply_start
from finetune.model.correction import FILE, Corrections, Factors, ModuleCorrection
from finetune.model.lora import lora_layers
from finetune.model.low_rank import low_rank
from finetune.model.quantize import QuantizedWeight, is_quantized, quantize_weight, replace_weight
from finetune.model.weights import Weights


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


def decompose(weight: Tensor, quantizer: Quantizer, rank: int, scale: float, init: LoftqInit) -> Decomposition:
    """LoftQ of one ``weight`` (d_out, d_in) with the scale ``scale`` > 0 of its adapter, in fp32 on the weight's device."""
    original = weight.float()
    norm = float(original.norm())
    quantized = quantizer(original)
    before = _relative(original - quantized.values, norm)
    base: Factors | None = None
    start = _residual(original - quantized.values, rank, scale, exact=init.exact)
    for _ in range(init.iterations - 1):
        base = start
        quantized = quantizer(base.added_to(original, -1.0))
        start = _residual(original - quantized.values, rank, scale, exact=init.exact)
    after = _relative(start.added_to(quantized.values - original), norm)
    return Decomposition(quantized, ModuleCorrection(start, base), before, after)


def _residual(residual: Tensor, rank: int, scale: float, *, exact: bool) -> Factors:
    b, a = low_rank(residual, rank, exact=exact)
    return Factors(a, b / scale, scale)


def _relative(difference: Tensor, norm: float) -> float:
    return float(difference.norm()) / norm if norm else 0.0


@dataclass(frozen=True, slots=True)
class Loftq:
    """LoftQ as a start that is computed from the weights on disk."""

    init: LoftqInit
    quantizer: Quantizer
    weights: Weights
    """Of the base, unquantized."""
    name: str = "loftq"
    file: str = FILE

    @property
    def two_parts(self) -> bool:
        """After one iteration the base is the plain quantization."""
        return self.init.iterations > 1

    def settings(self) -> dict[str, object]:
        """Every option of the quantization and of the algorithm."""
        return {
            "quantization": self.quantizer.quantization.model_dump(mode="json"),
            "compute_dtype": str(self.quantizer.compute_dtype),
            "init": self.init.model_dump(mode="json"),
        }

    def weight(self, name: str, layer: Any) -> Tensor:
        """W, read from disk: the model holds Q."""
        return self.weights.read(f"{name}.weight").to(layer.get_base_layer().weight.device)

    def compute(self, weight: Tensor, rank: int, scale: float) -> Computed:
        """`decompose`, without the quantized weight: `move_base` makes it again, so that a start from the cache is the same one."""
        found = decompose(weight, self.quantizer, rank, scale, self.init)
        return Computed(found.correction, found.before, found.after)

    def move_base(self, name: str, layer: Any, correction: ModuleCorrection) -> None:
        """Q_T in place of Q_1."""
        if correction.base is not None:
            moved = correction.base.added_to(self.weight(name, layer), -1.0)
            replace_weight(layer.get_base_layer(), self.quantizer(moved))


def apply_loftq(model: Any, base_dir: Path, tuning: Lora, quantizer: Quantizer, progress: Progress | None = None) -> StartReport:
    """Overwrite the fresh adapter "default" of ``model`` (a PEFT model on a quantized base) by LoftQ's start, layer by layer.

    The original weights are read from the safetensors of ``base_dir`` one at a time. With more than one iteration the quantized weights
    are replaced as well. LoRA on embeddings and on unquantized layers keeps its default start, where it changes nothing. Rank and scale
    are each module's own. See `computed_start.apply_start` for the cache and for ``progress``.

    Raises ConfigError where no target is quantized, VerificationError where the base's files are not the model's.
    """
    if not isinstance(tuning.init, LoftqInit):
        raise ConfigError("LoftQ was asked for without its section", where="tuning.init", fix="set tuning.init: {method: loftq}")
    targets = {name: layer for name, layer in lora_layers(model).items() if is_quantized(layer.get_base_layer())}
    if not targets:
        raise ConfigError(
            "LoftQ corrects quantized layers, and none of the targets is quantized",
            where="tuning.init",
            fix="set quantization: {method: nf4}",
        )
    with Weights.of_model(base_dir) as weights:
        return apply_start(targets, Loftq(tuning.init, quantizer, weights), base_dir, progress)


def save_base_correction(adapter_dir: Path, report: StartReport) -> Path:
    """Write `loftq_base.safetensors` into ``adapter_dir``; without it the adapter's base cannot be rebuilt."""
    return report.save(adapter_dir)


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
