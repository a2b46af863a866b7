"""The base model and its tokenizer, from safetensors alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune.config.schema import Quantization
from finetune.errors import ConfigError, HardwareError, VerificationError
from finetune.model.packed import stored_quantization
from finetune.model.quantize import bnb_config, compute_in, disable_cpu_repacking
from finetune.model.tokens import add_tokens
from finetune.planning.resolve import Resolved

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def storage_dtype(quantization: Quantization, resolved: Resolved) -> torch.dtype:
    """The type of the base's unquantized weights, and what quantized ones are dequantized to."""
    return DTYPES[resolved.precision.value if quantization.method == "none" else resolved.compute_dtype.value]


def load_tokenizer(directory: Path, new_tokens: Sequence[str] = ()) -> Any:
    """The tokenizer of ``directory``, never running code from it, with ``new_tokens`` added (`finetune.model.tokens`)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot load the tokenizer: {error}", where=str(directory), fix="name a model whose tokenizer transformers knows"
        ) from error
    add_tokens(tokenizer, new_tokens)
    return tokenizer


def load_base(directory: Path, quantization: Quantization, dtype: torch.dtype, device: torch.device) -> Any:
    """The frozen base in eval mode on ``device``.

    Weights of quantized modules stand for `quantize.roundtrip` of the original; everything else is in ``dtype``, which is also the type
    that quantized weights are dequantized to. A checkpoint that is quantized already is loaded as it is stored, whatever
    ``quantization`` says: `packed.require_agreement` is for those who train on it. Raises ConfigError for a model that transformers
    cannot build without remote code, HardwareError where memory runs out, VerificationError where a file is damaged or a tensor is
    missing, left over or of another shape.
    """
    stored = stored_quantization(directory)
    with _explained(directory, device):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            quantization_config=None if stored else bnb_config(quantization, dtype),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed: _require_complete refuses them by name
        )
    _require_complete(info, directory)
    _require_shapes(model, directory)
    disable_cpu_repacking(model)
    if stored:
        compute_in(model, dtype)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


@contextmanager
def _explained(directory: Path, device: torch.device) -> Iterator[None]:
    """What transformers raises while it loads ``directory``, as errors a user can act on."""
    try:
        yield
    except SafetensorError as error:
        raise VerificationError(
            f"the weights of the base model are damaged: {error}", where=str(directory), fix="download the model again"
        ) from error
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"cannot load the base model: {error}", where=str(directory), fix="use a causal language model with safetensors weights"
        ) from error
    except torch.OutOfMemoryError as error:
        raise HardwareError(
            "the base model does not fit on the device", where=str(device), fix="set quantization.method: nf4, or use a larger GPU"
        ) from error


def require_vocabulary(tokenizer: Any, model: Any) -> None:
    """ConfigError where ``tokenizer`` has tokens that ``model`` has no embedding for (pitfall A8)."""
    # the weight's rows: what PEFT puts in the place of an embedding does not always have num_embeddings
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds only {rows}",
            where="model.id",
            fix="use the model's own tokenizer, or a model whose embedding was resized for it",
        )


def _require_complete(info: dict[str, Any], directory: Path) -> None:
    """Missing weights would be random and left-over ones ignored: both are errors here (pitfall A4)."""
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has the wrong shape for"), ("unexpected_keys", "has no place for")):
        # a mismatched key is (name, shape in the file, shape in the model)
        names = sorted(name if isinstance(name, str) else str(name[0]) for name in info.get(key) or ())
        if names:
            raise VerificationError(
                f"the checkpoint {what} {names[0]}" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else ""),
                where=str(directory),
                fix="download the model again: its weights and config.json do not belong together",
            )


def _require_shapes(model: Any, directory: Path) -> None:
    """Quantized weights take the shape of the file whatever config.json says, and transformers does not list them as mismatched."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        state = getattr(module.weight, "quant_state", None)
        shape = tuple(module.weight.shape if state is None else state.shape)
        if shape != (module.out_features, module.in_features):
            raise VerificationError(
                f"the checkpoint has the wrong shape for {name}.weight: {shape} instead of {(module.out_features, module.in_features)}",
                where=str(directory),
                fix="download the model again: its weights and config.json do not belong together",
            )
