"""Adapters on a base model through PEFT: attaching, saving, and loading without a tensor left over."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from finetune.config.schema import Full, Tuning
from finetune.errors import VerificationError
from finetune.model.head import accept_wide_inputs
from finetune.model.lora import lora_config

WEIGHTS = "adapter_model.safetensors"


def attach(model: Any, tuning: Tuning) -> Any:
    """Make ``model`` trainable as ``tuning`` says. Every trainable parameter is fp32 (bf16 loses small updates, pitfall A12)."""
    if isinstance(tuning, Full):
        model.requires_grad_(True)
        trained = model
    else:
        config = lora_config(model, tuning)
        with _no_tying_warning():
            trained = get_peft_model(model, config)
        accept_wide_inputs(model.get_output_embeddings())
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trained


@contextmanager
def _no_tying_warning() -> Iterator[None]:
    """Without PEFT's advice on tied embeddings, which concerns its own merge: ours unties the pair and writes both sides."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
        yield


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name; a tied tensor appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: torch.nn.Module) -> int:
    """All scalars of the model; a 4-bit weight counts what it stands for, not its packed bytes."""
    return sum(_logical_size(parameter) for parameter in model.parameters())


def _logical_size(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def save(model: Any, directory: Path) -> None:
    """Write the adapter in PEFT's format (or, for full tuning, the model), then read it back (pitfall B9).

    Embedding matrices that only carry a LoRA are not copied into the file.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(directory)
        return
    model.save_pretrained(directory, save_embedding_layers=False, safe_serialization=True)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's template; ours is written with the run's figures
    _require_equal(model, directory)


def load(base: Any, directory: Path, *, is_trainable: bool = False) -> Any:
    """``base`` with the adapter of ``directory``: every tensor of the file is used and none is missing (pitfall A4)."""
    try:
        with _no_tying_warning():
            model = PeftModel.from_pretrained(base, directory, is_trainable=is_trainable, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise VerificationError(
            f"cannot load the adapter: {error}", where=str(directory), fix="name the adapter of the same base model"
        ) from error
    _restore_precision(model, load_file(directory / WEIGHTS))
    _require_equal(model, directory)
    accept_wide_inputs(model.get_base_model().get_output_embeddings())
    return model


def _restore_precision(model: Any, stored: dict[str, torch.Tensor]) -> None:
    """Take fp32 tensors of the file as they are: PEFT makes modules_to_save copies in the base's type, and rounds what it loads to it."""
    for name, parameter in model.named_parameters():
        value = stored.get(name.replace(".modules_to_save.default.", ".").replace(".default.", "."))
        if value is not None and value.dtype == torch.float32 and parameter.dtype.itemsize < value.dtype.itemsize:
            parameter.data = value.to(parameter.device)


def _require_equal(model: Any, directory: Path) -> None:
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = load_file(directory / WEIGHTS)
    for name in sorted(set(live) | set(stored)):
        if name not in stored or name not in live:
            raise VerificationError(
                f"the adapter tensor {name} is {'not used by the model' if name in stored else 'missing'}", where=str(directory / WEIGHTS)
            )
        # the wider of the two types holds both values exactly: a rounded copy is not equal
        wide = torch.promote_types(live[name].dtype, stored[name].dtype)
        if not torch.equal(live[name].detach().cpu().to(wide), stored[name].to(wide)):
            raise VerificationError(
                f"the adapter tensor {name} differs from the file", where=str(directory / WEIGHTS), fix="save or copy it again"
            )
    if not stored:
        raise VerificationError("the adapter file is empty", where=str(directory / WEIGHTS), fix="train again")


def is_adapter(model: torch.nn.Module) -> bool:
    """Whether ``model`` carries a PEFT adapter that can be switched off."""
    return isinstance(model, PeftModel)
