"""The trainable model of a run: quantized base, adapter, initialization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import Config, EightBit, FourBit, LoftqInit, Lora
from finetune.model.adapters import attach
from finetune.model.builtin import public_name
from finetune.model.load import load_base, storage_dtype
from finetune.model.loftq import LoftqReport, Quantizer, apply_loftq, restore_base
from finetune.planning.resolve import Resolved


@dataclass(frozen=True, slots=True)
class Built:
    """A model that is ready to train."""

    model: Any
    loftq: LoftqReport | None
    """What LoftQ did, where it initialized the adapter."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should see of how the model was built."""
        if self.loftq is None:
            return ()
        layers = (f"{kind} {error.before:.3f} -> {error.after:.3f}" for kind, error in self.loftq.layers.items())
        return (f"LoftQ, relative quantization error: {', '.join(layers)}",)


def build_model(config: Config, base: Path, resolved: Resolved, device: torch.device, resumed: Path | None = None) -> Built:
    """Load the base of ``config`` onto ``device`` and make it trainable; seed first.

    ``resumed`` is the run directory whose base is to be rebuilt instead of initialized anew.
    """
    dtype = storage_dtype(config.quantization, resolved)
    model = attach(load_base(base, config.quantization, dtype, device), config.tuning)
    if isinstance(config.tuning, Lora):
        # what others load the adapter onto; a path of this machine would mean nothing to them
        model.peft_config["default"].base_model_name_or_path = public_name(config.model.id)
    if resolved.gradient_checkpointing.value:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Built(model, _initialize(model, config, base, dtype, resumed))


def _initialize(model: Any, config: Config, base: Path, dtype: torch.dtype, resumed: Path | None) -> LoftqReport | None:
    if not isinstance(config.tuning, Lora) or not isinstance(config.tuning.init, LoftqInit):
        return None
    if resumed is not None:
        restore_base(model, resumed, base, config.quantization, dtype)
        return None
    assert isinstance(config.quantization, FourBit | EightBit), "config/checks.py refuses LoftQ on an unquantized base"
    return apply_loftq(model, base, config.tuning, Quantizer(config.quantization, dtype))
