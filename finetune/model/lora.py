"""PEFT's configuration of LoRA and its variants."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

from finetune.config.schema import Lora
from finetune.errors import ConfigError
from finetune.model.targets import embedding_module, find_targets

_PEFT_INIT: dict[str, bool | str] = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal", "loftq": True}


def scale_of(tuning: Lora) -> float:
    """s in h = Wx + s BAx: alpha/r (2106.09685), or alpha/sqrt(r) for rsLoRA (2312.03732)."""
    return tuning.alpha / (tuning.rank**0.5 if tuning.scaling == "rslora" else tuning.rank)


def lora_config(model: Any, tuning: Lora) -> LoraConfig:
    """PEFT's configuration for ``tuning`` on ``model``; ConfigError where a target matches nothing."""
    targets = find_targets(model, tuning)
    embedding = embedding_module(model)
    if tuning.init.method == "orthogonal" and tuning.rank % 2:
        raise ConfigError("orthogonal initialization needs an even rank", where="tuning.rank", fix=f"use {tuning.rank + 1}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        use_rslora=tuning.scaling == "rslora",
        use_dora=tuning.dora,
        lora_dropout=tuning.dropout,
        init_lora_weights=_PEFT_INIT[tuning.init.method],
        target_modules=[*targets, embedding] if tuning.embeddings == "lora" else targets,
        modules_to_save=[embedding] if tuning.embeddings == "full" else None,
    )
