"""The base model and its tokenizer, from safetensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune.config.schema import Quantization
from finetune.errors import ConfigError, HardwareError, VerificationError
from finetune.model.quantize import bnb_config, disable_cpu_repacking
from finetune.planning.resolve import Resolved

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def storage_dtype(quantization: Quantization, resolved: Resolved) -> torch.dtype:
    """The type of the base's unquantized weights, and what quantized ones are dequantized to."""
    return DTYPES[resolved.precision.value if quantization.method == "none" else resolved.compute_dtype.value]


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of ``directory``, never running code from it."""
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot load the tokenizer: {error}", where=str(directory), fix="name a model whose tokenizer transformers knows"
        ) from error


def load_base(directory: Path, quantization: Quantization, dtype: torch.dtype, device: torch.device) -> Any:
    """The frozen base in eval mode on ``device``.

    Weights of quantized modules stand for `quantize.roundtrip` of the original; everything else is in ``dtype``, which is also the type
    that quantized weights are dequantized to. Raises ConfigError for a model that transformers cannot build without remote code,
    HardwareError where memory runs out, VerificationError where a tensor is missing or left over.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            quantization_config=bnb_config(quantization, dtype),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"cannot load the base model: {error}", where=str(directory), fix="use a causal language model with safetensors weights"
        ) from error
    except torch.OutOfMemoryError as error:
        raise HardwareError(
            "the base model does not fit on the device", where=str(device), fix="set quantization.method: nf4, or use a larger GPU"
        ) from error
    _require_complete(info, directory)
    disable_cpu_repacking(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def _require_complete(info: dict[str, Any], directory: Path) -> None:
    """Missing weights would be random and left-over ones ignored: both are errors here (pitfall A4)."""
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has the wrong shape for"), ("unexpected_keys", "has no place for")):
        names = sorted(map(str, info.get(key) or ()))
        if names:
            raise VerificationError(
                f"the checkpoint {what} {names[0]}" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else ""),
                where=str(directory),
                fix="download the model again",
            )
