"""Modules of our own inside a base model, for the methods that PEFT does not have: how they are found, switched, saved and loaded.

A part hangs on a module of the base as a child and works through a forward hook, so that the base stays a plain transformers model. Its
adapter directory holds `adapter_model.safetensors` and `adapter_config.json` with the fields

    format       "finetune-adapter-1"
    method       "houlsby" or "bitfit", and beside it the fields of that section of the configuration
    base_model_name_or_path

The keys of the tensors are names in the base model: `model.layers.0.mlp.houlsby.down.weight` for a part of its own, and the name of the
tensor it stands for, `model.layers.0.self_attn.q_proj.bias`, for a trained copy. **A bitfit adapter is nothing but whole copies**: to merge
it, each tensor of the base is replaced by that of the same name.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.config.schema import Bitfit, Houlsby
from finetune.errors import VerificationError
from finetune.model.weights import Weights
from finetune.sealed import write_json

FORMAT = "finetune-adapter-1"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

Own = Bitfit | Houlsby
"""The methods whose adapters are in this format."""


class Part(nn.Module):
    """A trained module on a module of the base, which changes the latter's output while ``enabled``."""

    enabled: bool = True

    def __init__(self) -> None:
        """Enabled."""
        super().__init__()
        self.enabled = True

    @abstractmethod
    def changed(self, output: Tensor) -> Tensor:
        """What the module that carries the part puts out instead of ``output``; same shape and type."""

    def place(self, carrier: nn.Module, name: str) -> None:
        """Become the child ``name`` of ``carrier`` and act on its output (the first one, where it has several)."""
        carrier.add_module(name, self)
        carrier.register_forward_hook(lambda _module, _inputs, output: self._on(output))

    def _on(self, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.changed(output[0]), *output[1:])
        return self.changed(output)


def parts(model: nn.Module) -> dict[str, Part]:
    """Every part of ``model`` by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Part)}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside the block ``model`` computes what its base does."""
    found = parts(model).values()
    before = [part.enabled for part in found]
    for part in found:
        part.enabled = False
    try:
        yield
    finally:
        for part, enabled in zip(found, before, strict=True):
            part.enabled = enabled


def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all parts by their key in the file."""
    return {
        _key(f"{name}.{part_name}"): parameter for name, part in parts(model).items() for part_name, parameter in part.named_parameters()
    }


def _key(name: str) -> str:
    """A copy of a bias is filed under the name of the bias."""
    return name.replace(".bitfit.", ".")


def save_parts(model: Any, directory: Path) -> None:
    """Write the parts of ``model`` and how they were made: its attributes ``own_tuning`` and ``own_base``."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors(model).items()}, directory / WEIGHTS)
    write_config(config_fields(model), directory)


def config_fields(model: Any) -> dict[str, Any]:
    """How the parts of ``model`` were made, as its file says it."""
    return {"format": FORMAT, **model.own_tuning.model_dump(mode="json"), "base_model_name_or_path": model.own_base}


def write_config(fields: Mapping[str, Any], directory: Path) -> None:
    """Write `config_fields` into ``directory``."""
    write_json(directory / CONFIG, fields)


def read_config(directory: Path) -> Own | None:
    """How the adapter of ``directory`` was made; None where it is one of PEFT's. VerificationError where the file is damaged."""
    where = str(directory / CONFIG)
    try:
        fields = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(fields, Mapping):
            raise ValueError("it is not an object")
        if "peft_type" in fields:
            return None
        if fields.get("format") != FORMAT:
            raise ValueError(f"the format is {fields.get('format')!r}")
        settings = {key: value for key, value in fields.items() if key not in ("format", "base_model_name_or_path")}
        made: Own = TypeAdapter(Own).validate_python(settings)
    except (OSError, ValueError, ValidationError) as error:
        raise VerificationError(
            f"cannot read the adapter's configuration: {error}", where=where, fix="restore the file from the run"
        ) from error
    return made


@torch.no_grad()
def read_parts(model: Any, directory: Path) -> None:
    """Put the tensors of ``directory`` into the parts of ``model``, in the type they are stored in.

    VerificationError where one is left over, missing or of another shape.
    """
    live = tensors(model)
    with Weights(directory, (WEIGHTS,)) as stored:
        for name in sorted(set(live) | set(stored.info)):
            if name not in live or name not in stored.info:
                what = "not used by the model" if name in stored.info else "missing"
                raise VerificationError(f"the adapter tensor {name} is {what}", where=str(directory / WEIGHTS))
            if stored.info[name].shape != tuple(live[name].shape):
                raise VerificationError(
                    f"the adapter tensor {name} has the shape {stored.info[name].shape}", where=str(directory / WEIGHTS)
                )
            live[name].data = stored.read(name).to(live[name].device)
