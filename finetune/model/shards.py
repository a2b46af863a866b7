"""Writing safetensors one tensor at a time, so that a shard is never in memory as a whole.

The format is a length, a JSON header with every tensor's type, shape and byte range, and the bytes. Shapes are known before the first
tensor is computed, so the header can be written first.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from finetune.errors import VerificationError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that will be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


_BESIDE = 64 * 2**20
"""Bytes that may wait to be written while the caller computes the next tensor; a larger one is waited for."""


class ShardWriter:
    """A safetensors file that is filled in the order of ``slots``; a context manager that forces it to disk.

    Bytes are written on a thread of its own: tensors must not change once they were given. What fails is raised by a later call or at the
    end of the block.
    """

    def __init__(self, path: Path, slots: Mapping[str, Slot], metadata: Mapping[str, str] | None = None) -> None:
        """Create ``path`` and write its header, with ``metadata`` beside the format's name. FileExistsError where it exists."""
        self._path = path
        self._slots = dict(slots)
        self._waiting = list(slots)
        self._file = path.open("xb")
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for name, slot in slots.items():
            header[name] = {"dtype": _NAMES[slot.dtype], "shape": list(slot.shape), "data_offsets": [offset, offset + slot.size]}
            offset += slot.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._thread = ThreadPoolExecutor(1, "shard")
        self._flying: deque[tuple[int, Future[int]]] = deque()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append ``tensor``, which must be the next slot with its shape and type."""
        slot = self._slots[name]
        if not self._waiting or self._waiting[0] != name or tuple(tensor.shape) != slot.shape or tensor.dtype != slot.dtype:
            raise VerificationError(
                f"{name} ({tuple(tensor.shape)}, {tensor.dtype}) was written where {self._waiting[:1]} with {slot} was due",
                where=str(self._path),
            )
        self._waiting.pop(0)
        if slot.size:
            self._await(max(0, _BESIDE - slot.size))
            # The tensor's own memory is written, without a second copy. (numpy's tofile does so too, but loses the last 4 KiB of a full
            # disk without a word.)
            array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._flying.append((slot.size, self._thread.submit(self._file.write, array.data)))
            del array, tensor
            self._await(_BESIDE)

    def _await(self, size: int) -> None:
        """Return when no more than ``size`` bytes wait."""
        while sum(waiting for waiting, _ in self._flying) > size:
            self._flying.popleft()[1].result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._waiting:
                    raise VerificationError(
                        f"{len(self._waiting)} tensors were never written, {self._waiting[0]} first", where=str(self._path)
                    )
                self._await(0)
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._file.close()
