"""The arithmetic of training that is ours: switched on where it is proven equal to the libraries', else left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.config.schema import Full, Norm, Tuning
from finetune.model import fast_lora, fast_mlp, fast_norm
from finetune.model.head import causal_model
from finetune.model.packing import enable_packing


@dataclass(frozen=True, slots=True)
class Accelerated:
    """What was switched on."""

    packed: bool
    """Whether micro-batches are run without padding."""
    linears: int
    """LoRA layers that compute as one function."""
    norms: int
    """Norms that do."""
    mlps: int = 0
    """Gated MLPs that do, their three LoRA layers included."""

    @property
    def summary(self) -> str:
        """For people."""
        own = f"{self.linears} LoRA layers, {self.mlps} MLPs and {self.norms} norms as one function each"
        return f"{'no padding' if self.packed else 'padded'}, {own}"


def accelerate(model: Any, tuning: Tuning, *, pack: bool = True) -> Accelerated:
    """Switch on what ``model`` can run exactly: the same for training and for whoever loads what was trained by ``tuning``.

    ``pack`` false: padding stays for now, since the model will move to another kind of device.
    """
    norms = 0 if isinstance(tuning, Full | Norm) else fast_norm.install(model)  # norms that train are left to the library
    return Accelerated(pack and enable_packing(causal_model(model)), fast_lora.install(model), norms, fast_mlp.install(model))
