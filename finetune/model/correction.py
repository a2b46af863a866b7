"""The base that an adapter belongs to where that is not the one on disk, as a file beside the adapter.

**LoftQ: `loftq_base.safetensors`.**

LoftQ starts the adapter at factors A0, B0 that are not zero, and with more than one iteration it changes the quantized base as well:

    Q  = quantize(W - s B' A')      A', B': the factors of the iteration before; none after one iteration
    W ~ Q + s B0 A0

Q itself is not stored. W is on disk already, and A', B' rebuild Q from it. A0, B0 are stored to take the start away again when the adapter
is folded into W instead of Q: W + s(BA - B0 A0). Keys are `MODULE.start.A`, `.start.B` and, where the base changed, `.base.A`, `.base.B`;
the metadata holds the scale s of each module.

**PiSSA and OLoRA: `moved_base.safetensors`**, in the run directory alone. The adapter starts at a part of the weight that leaves the base:
training runs on W - s B0 A0. The file holds A0, B0 as `.start.A`, `.start.B`. The finished adapter is exported as s(BA - B0 A0) on W.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from finetune.errors import VerificationError
from finetune.model.shards import ShardWriter, Slot
from finetune.model.weights import Weights

FILE = "loftq_base.safetensors"
MOVED = "moved_base.safetensors"
_FORMAT = "finetune-loftq-1"


@dataclass(frozen=True, slots=True)
class Factors:
    """A low-rank matrix s B A."""

    a: Tensor
    """(r, d_in) fp32"""
    b: Tensor
    """(d_out, r) fp32"""
    scale: float
    """s"""

    def added_to(self, weight: Tensor, sign: float = 1.0) -> Tensor:
        """``weight`` + ``sign`` s B A, (d_out, d_in) fp32, on the device of ``weight``; the one place this sum is formed."""
        a, b = self.a.to(weight.device), self.b.to(weight.device)
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
            raise VerificationError(
                f"low-rank factors {tuple(b.shape)} x {tuple(a.shape)} do not fit a weight of shape {tuple(weight.shape)}",
                fix="check that the base model is the one the adapter was made for",
            )
        return torch.addmm(weight.float(), b, a, alpha=sign * self.scale)


@dataclass(frozen=True, slots=True)
class ModuleCorrection:
    """What LoftQ, PiSSA or OLoRA did to one module."""

    start: Factors
    """B0 A0, where the adapter starts."""
    base: Factors | None
    """B' A', taken from the weight before it was quantized; None where the base is the plain quantization, and for PiSSA and OLoRA, whose
    base lacks the start itself."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of the factors of one module before they are computed."""

    d_out: int
    d_in: int
    rank: int
    scale: float
    """s"""


class CorrectionWriter:
    """The file of corrections, written module by module so that they are never in memory together; a context manager."""

    def __init__(self, path: Path, shapes: Mapping[str, Shape], *, base: bool) -> None:
        """Create ``path`` for the modules of ``shapes``, in that order; ``base``: each comes with factors of its base."""
        parts = ("start", "base") if base else ("start",)
        slots = {
            f"{name}.{part}.{side}": Slot(size, torch.float32)
            for name, shape in shapes.items()
            for part in parts
            for side, size in (("A", (shape.rank, shape.d_in)), ("B", (shape.d_out, shape.rank)))
        }
        scales = {name: shape.scale for name, shape in shapes.items()}
        self._writer = ShardWriter(path, slots, {"format": _FORMAT, "scales": json.dumps(scales)})

    def write(self, name: str, correction: ModuleCorrection) -> None:
        """Append the correction of the module that is due."""
        for part, factors in (("start", correction.start), ("base", correction.base)):
            if factors is not None:
                self._writer.write(f"{name}.{part}.A", factors.a.detach().float())
                self._writer.write(f"{name}.{part}.B", factors.b.detach().float())

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.__exit__(kind, error, trace)


class Corrections:
    """The corrections stored beside an adapter, read module by module; a context manager."""

    def __init__(self, directory: Path, file: str = FILE) -> None:
        """Open ``file`` of the adapter ``directory``; VerificationError where it is missing, damaged or of another format."""
        self._weights = Weights(directory, (file,))
        where = str(directory / file)
        try:
            if self._weights.metadata.get("format") != _FORMAT:
                raise VerificationError("the file holds no corrections of a base", where=where, fix="restore it from the run")
            self._scales = {str(name): float(scale) for name, scale in json.loads(self._weights.metadata["scales"]).items()}
            self._require_complete(where)
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            self.close()
            raise VerificationError(f"the scales are damaged: {error}", where=where, fix="restore the file from the run") from error
        except VerificationError:
            self.close()
            raise

    def _require_complete(self, where: str) -> None:
        found = set(self._weights.info)
        start = {f"{name}.start.{side}" for name in self._scales for side in "AB"}
        base = {f"{name}.base.{side}" for name in self._scales for side in "AB"}
        wrong = sorted((start - found) | (found - start - base) | {key for key in found & base if f"{key[:-1]}{_other(key)}" not in found})
        if wrong:
            raise VerificationError(f"tensors are missing or left over, {wrong[0]} first", where=where, fix="restore the file from the run")

    @property
    def modules(self) -> frozenset[str]:
        """Names of the modules whose start was computed from their weight."""
        return frozenset(self._scales)

    def read(self, module: str) -> ModuleCorrection:
        """The correction of ``module``, which must be one of `modules`."""
        base = self._factors(module, "base") if f"{module}.base.A" in self._weights.info else None
        return ModuleCorrection(self._factors(module, "start"), base)

    def _factors(self, module: str, part: str) -> Factors:
        return Factors(self._weights.read(f"{module}.{part}.A"), self._weights.read(f"{module}.{part}.B"), self._scales[module])

    def close(self) -> None:
        """Close the file."""
        self._weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


def _other(key: str) -> str:
    return "B" if key.endswith("A") else "A"
