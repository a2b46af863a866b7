"""Checkpoints that bitsandbytes quantized before they were saved, as `save_pretrained` of a 4-bit or 8-bit model writes them.

config.json holds a `quantization_config`. A 4-bit weight of shape (d_out, d_in) is stored as `weight` (d_out * d_in / 2, 1) uint8 with the
constants of its blocks beside it: `weight.absmax`, `weight.quant_map`, with double quantization `weight.nested_absmax` and
`weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4`, JSON as bytes. An 8-bit one is `weight` int8 with a scale a row,
`SCB`, and `weight_format`. The unquantized weights are not there: what the constants give is the base, in training and in merging.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor

from finetune.config.schema import EightBit, FourBit, LoftqInit, Lora, Quantization, Tuning
from finetune.errors import ConfigError, VerificationError
from finetune.model.weights import TensorInfo, Weights

_STATE = ".quant_state.bitsandbytes__"
_CONSTANTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def stored_quantization(directory: Path) -> FourBit | EightBit | None:
    """How the checkpoint in ``directory`` is quantized; None where it is not. ConfigError where another library quantized it."""
    path = directory / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"cannot read config.json of the base model: {error}", where=str(path), fix="check model.id") from error
    if not settings:
        return None
    if settings.get("load_in_4bit") and settings.get("bnb_4bit_quant_type") in ("nf4", "fp4"):
        return FourBit(method=settings["bnb_4bit_quant_type"], double_quant=bool(settings.get("bnb_4bit_use_double_quant")))
    if settings.get("load_in_8bit"):
        return EightBit(method="int8")
    raise ConfigError(
        f"the checkpoint is quantized by {settings.get('quant_method', 'an unknown method')!r}, and only bitsandbytes' formats are read",
        where=str(path),
        fix="use the original, unquantized model as model.id",
    )


def require_agreement(directory: Path, quantization: Quantization, tuning: Tuning) -> None:
    """ConfigError where the checkpoint in ``directory`` is quantized, and the run says otherwise or needs the weights before that."""
    stored = stored_quantization(directory)
    if stored is None:
        return
    said, found = _described(quantization), _described(stored)
    if said != found:
        raise ConfigError(
            f"the checkpoint is quantized already as {found}, and the run says {said}",
            where=f"quantization, with model.id {directory}",
            fix=f"set quantization: {found}, or use the original model as model.id",
        )
    if isinstance(tuning, Lora) and isinstance(tuning.init, LoftqInit):
        raise ConfigError(
            "LoftQ makes up for what quantization took from the weights, and this checkpoint does not hold them any more",
            where="tuning.init",
            fix="use the original model as model.id, or init: {method: default}",
        )


def _described(quantization: Quantization) -> str:
    """The part of a quantization that decides the weights, as YAML."""
    if isinstance(quantization, FourBit):
        return f"{{method: {quantization.method}, double_quant: {str(quantization.double_quant).lower()}}}"
    return f"{{method: {quantization.method}}}"


class PackedWeights:
    """The weights of a quantized checkpoint as the values they stand for, read on demand; a context manager like `Weights`."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        """Open ``directory``; values are dequantized to ``dtype`` on ``device``, as a model computes with them that was loaded so.

        VerificationError where constants are missing or left over.
        """
        self._dtype = dtype
        self._raw = Weights.of_model(directory, packed=True)
        self._device = device
        self._where = str(directory)
        try:
            self._states = {name.partition(_STATE)[0]: name for name in self._raw.info if _STATE in name}  # weight -> name of its JSON
            self._rows = {f"{name.removesuffix('SCB')}weight" for name in self._raw.info if name.endswith(".SCB")}
            self._info = self._described()
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files."""
        return self._raw.files

    @property
    def info(self) -> Mapping[str, TensorInfo]:
        """Place, shape and type of every weight, as the values that are read."""
        return self._info

    @property
    def modules(self) -> frozenset[str]:
        """Modules whose weight is quantized."""
        return frozenset(name.removesuffix(".weight") for name in (*self._states, *self._rows))

    def _described(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        constants = {f"{weight}.{part}" for weight in self._states for part in _CONSTANTS} | set(self._states.values())
        constants |= {f"{weight.removesuffix('weight')}{part}" for weight in self._rows for part in ("SCB", "weight_format")}
        for name, info in self._raw.info.items():
            if name in self._states:
                state = self._settings(name)
                found[name] = TensorInfo(info.file, tuple(state["shape"]), self._dtype)
            elif name in self._rows:
                found[name] = TensorInfo(info.file, info.shape, self._dtype)
            elif name not in constants:
                found[name] = info
        wrong = sorted((set(self._states) | self._rows) - set(found)) + [
            name for name, info in found.items() if not info.dtype.is_floating_point
        ]
        if wrong or not self.modules:
            what = f"{wrong[0]} has no constants to read it by" if wrong else "config.json speaks of quantized weights, and none are there"
            raise VerificationError(what, where=self._where, fix="download the model again")
        return found

    def _settings(self, weight: str) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(bytes(self._raw.read(self._states[weight]).tolist()))
        return settings

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """The values of the weight ``name``; one that is not quantized comes as it is stored."""
        tensor = self._raw.read(name)
        if name in self._states:
            parts = {part: self._raw.read(f"{name}.{part}") for part in _CONSTANTS if f"{name}.{part}" in self._raw.info}
            parts[f"{_STATE.removeprefix('.')}{self._kind(name)}"] = self._raw.read(self._states[name])
            try:
                state = QuantState.from_dict(parts, torch.device(self._device))
            except (KeyError, ValueError, AssertionError) as error:
                raise VerificationError(f"the constants of {name} are damaged: {error}", where=self._where) from error
            state.dtype = self._dtype
            values: Tensor = dequantize_4bit(tensor.to(self._device), state)
            return values
        if name in self._rows:
            scales = self._raw.read(f"{name.removesuffix('weight')}SCB").to(self._device)
            rows: Tensor = int8_vectorwise_dequant(tensor.to(self._device), scales)
            return rows.to(self._dtype)
        return tensor

    def _kind(self, name: str) -> str:
        return self._states[name].partition(_STATE)[2]

    def close(self) -> None:
        """Close the files."""
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


def open_weights(directory: Path, dtype: torch.dtype, device: str = "cpu") -> Weights | PackedWeights:
    """The weights of ``directory`` as values; quantized ones dequantized to ``dtype`` on ``device``."""
    return Weights.of_model(directory) if stored_quantization(directory) is None else PackedWeights(directory, dtype, device)
