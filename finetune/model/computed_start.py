"""Starts that are computed from the base's weights: once, kept in the cache, and put into the model layer by layer.

Only one layer's weight and factors are in memory at a time, on top of the model: factors go to the cache's file as they are computed, and
from there into the adapter. A second run of the same start reads the file; of several processes one computes and the others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune.cache import cached
from finetune.errors import VerificationError
from finetune.model.builtin import fingerprint
from finetune.model.correction import Corrections, CorrectionWriter, ModuleCorrection, Shape
from finetune.model.heap import return_freed_memory as return_freed_memory
from finetune.model.lora import ADAPTER
from finetune.model.quantize import dequantized, is_quantized
from finetune.sealed import read_json, write_json

_VERSION = 1
"""Raise it when the same weights, ranks and scales would give other factors."""
_ERRORS = "errors.json"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Computed:
    """The start of one module."""

    correction: ModuleCorrection
    before: float
    """||W - base|| / ||W|| without adapter; for PiSSA and OLoRA 0"""
    after: float
    """||W - base - s B A|| / ||W||; for PiSSA and OLoRA ||W - s B A|| / ||W||, the share that stays in the base"""


@dataclass(frozen=True, slots=True)
class LayerError:
    """The two figures of `Computed` for one type of layer, mean over the model."""

    before: float
    after: float
    modules: int


@dataclass(frozen=True, slots=True)
class StartReport:
    """Where the factors of a start lie, and what it did to each type of layer."""

    directory: Path
    """In the cache."""
    file: str
    layers: Mapping[str, LayerError]
    """By type of layer, such as `q_proj`."""

    def save(self, destination: Path) -> Path:
        """Copy the factors into the directory ``destination``; without them the base that was trained on cannot be rebuilt."""
        return Path(shutil.copyfile(self.directory / self.file, destination / self.file))


class Method(Protocol):
    """How a start is computed and what it does to the base."""

    @property
    def name(self) -> str:
        """`loftq`, `pissa` or `olora`: where in the cache its factors lie."""

    @property
    def file(self) -> str:
        """Name of the file with the factors."""

    @property
    def two_parts(self) -> bool:
        """Whether a correction has factors of its base."""

    def settings(self) -> Mapping[str, object]:
        """All that the factors depend on beside the weights, ranks and scales; JSON."""

    def weight(self, name: str, layer: Any) -> Tensor:
        """The weight (d_out, d_in) of the module ``name`` that the factors are computed from, on the layer's device."""

    def compute(self, weight: Tensor, rank: int, scale: float) -> Computed:
        """The start for one ``weight``."""

    def move_base(self, name: str, layer: Any, correction: ModuleCorrection) -> None:
        """Make the base of ``layer`` the one that ``correction`` belongs to."""


def apply_start(layers: Mapping[str, Any], method: Method, base_dir: Path, progress: Progress | None = None) -> StartReport:
    """Overwrite the fresh adapter of ``layers`` (PEFT's LoRA layers by module name) by the start that ``method`` computes.

    DoRA magnitudes become the row norms of base + sBA, as PEFT defines them at the start. ``progress`` is called with (done, of) while
    factors are computed, and not at all where they are in the cache. VerificationError where the base's files are not the model's.
    """

    def make(directory: Path) -> None:
        _compute_all(directory, layers, method, progress)

    directory = cached(method.name, _key(layers, method, base_dir), make)
    install(layers, method, directory)
    errors = read_json(directory / _ERRORS)["layers"]
    return StartReport(directory, method.file, {kind: LayerError(**values) for kind, values in errors.items()})


def _key(layers: Mapping[str, Any], method: Method, base_dir: Path) -> str:
    """Names everything that the factors are a function of, the libraries that quantize and decompose included."""
    content = {
        "code": _VERSION,
        "libraries": {package: version(package) for package in ("torch", "bitsandbytes")},
        "device": str(next(iter(layers.values())).lora_A[ADAPTER].weight.device.type),
        "base": fingerprint(base_dir),
        "settings": dict(method.settings()),
        "modules": {name: [layer.lora_A[ADAPTER].weight.shape[0], layer.scaling[ADAPTER]] for name, layer in layers.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@torch.no_grad()
def _compute_all(directory: Path, layers: Mapping[str, Any], method: Method, progress: Progress | None) -> None:
    errors: dict[str, list[tuple[float, float]]] = {}
    shapes = {name: _shape(layer) for name, layer in layers.items()}
    with CorrectionWriter(directory / method.file, shapes, base=method.two_parts) as writer:
        for done, (name, layer) in enumerate(layers.items(), start=1):
            weight, shape = method.weight(name, layer), shapes[name]
            if tuple(weight.shape) != (shape.d_out, shape.d_in):
                raise VerificationError(f"the base's {name} has the shape {tuple(weight.shape)}, not the model's", fix="check model.id")
            found = method.compute(weight, shape.rank, shape.scale)
            writer.write(name, found.correction)
            errors.setdefault(name.rpartition(".")[2], []).append((found.before, found.after))
            # small tensors that stay among a layer's matrices would make the heap grow with the number of layers: measured, by 13 MiB for
            # each layer whose weights have 25
            return_freed_memory()
            if progress:
                progress(done, len(layers))
    write_json(directory / _ERRORS, {"layers": {kind: _mean(found) for kind, found in errors.items()}})


def _shape(layer: Any) -> Shape:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return Shape(b.shape[0], a.shape[1], a.shape[0], float(layer.scaling[ADAPTER]))


def _mean(pairs: list[tuple[float, float]]) -> dict[str, float]:
    count = len(pairs)
    return {"before": sum(before for before, _ in pairs) / count, "after": sum(after for _, after in pairs) / count, "modules": count}


@torch.no_grad()
def install(layers: Mapping[str, Any], method: Method, directory: Path) -> None:
    """Put the factors that lie in ``directory`` into ``layers``, and their bases beside them."""
    with Corrections(directory, method.file) as corrections:
        for name, layer in layers.items():
            correction = corrections.read(name)
            layer.lora_A[ADAPTER].weight.copy_(correction.start.a)
            layer.lora_B[ADAPTER].weight.copy_(correction.start.b)
            method.move_base(name, layer, correction)
            magnitudes = getattr(layer, "lora_magnitude_vector", {})
            if ADAPTER in magnitudes:
                # DoRA's magnitude starts as the norm of the weight it multiplies, so that the start is base + sBA and not a rescaled one
                magnitudes[ADAPTER].weight.copy_(correction.start.added_to(base_values(layer)).norm(dim=1))
            return_freed_memory()


def base_values(layer: Any) -> Tensor:
    """What the base of a LoRA ``layer`` computes with, (d_out, d_in) float."""
    base = layer.get_base_layer()
    values: Tensor = dequantized(base) if is_quantized(base) else base.weight
    return values
