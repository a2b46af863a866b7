"""What a model's configuration says about its weights, found on the meta device: nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config.schema import NoQuantization, Quantization
from finetune.errors import ConfigError
from finetune.model.quantize import quantized_modules


@dataclass(frozen=True, slots=True)
class Layout:
    """The weights of a causal language model by their part in it."""

    embedding: str
    """Name of the input embedding's weight."""
    head: str | None
    """Name of the output head's weight."""
    tied: bool
    quantized: frozenset[str]
    """Modules that training quantized."""
    expected: frozenset[str]
    """Names of all weights the model needs; tied ones once."""


def read_layout(directory: Path, quantization: Quantization) -> Layout:
    """The layout of the model in ``directory``; ConfigError where transformers cannot build it without remote code."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"cannot build the base model: {error}", where=str(directory), fix="use a causal language model that transformers knows"
        ) from error
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    tied = set(model.all_tied_weights_keys)
    return Layout(
        embedding=f"{names[id(model.get_input_embeddings())]}.weight",
        head=f"{names[id(head)]}.weight" if head is not None else None,
        tied=bool(tied),
        quantized=frozenset() if isinstance(quantization, NoQuantization) else quantized_modules(config),
        expected=frozenset(name for name, _ in model.named_parameters()) - tied,
    )
