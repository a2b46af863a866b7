"""Weights on disk, read tensor by tensor: a directory of safetensors shards is never in memory as a whole.

Only safetensors are read. A directory that holds nothing but pickled weights (`.bin`, `.pt`) is refused, since unpickling runs code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.errors import VerificationError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAPPED_BYTES = 32 * 1024 * 1024
"""Bytes read from a file before it is mapped anew: what reading a model layer by layer may add to the process's memory."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header of a file says about a tensor."""

    file: str
    """Name of the file that holds it, without directory."""
    shape: tuple[int, ...]
    dtype: torch.dtype


def _is_quantized(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False  # what is wrong with config.json is said where it is read


class Weights:
    """The tensors of one or several safetensors files, read on demand; a context manager that closes the files.

    >>> with Weights.of_model(directory) as weights:
    ...     weights.read("lm_head.weight")
    """

    def __init__(self, directory: Path, files: tuple[str, ...]) -> None:
        """Open ``files`` of ``directory``. VerificationError: a file is missing, damaged, or holds a tensor that another one holds."""
        self.directory = directory
        self.files = files
        self.metadata: dict[str, str] = {}
        """The string pairs that the headers carry beside the tensors, of all files together."""
        self._handles: dict[str, Any] = {}
        self._mapped: dict[str, int] = {}
        self._info: dict[str, TensorInfo] = {}
        try:
            for file in files:
                self._add(file)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_model(cls, directory: Path, *, packed: bool = False) -> Self:
        """The weights of a model directory: `model.safetensors`, or the shards that its index names.

        VerificationError for a checkpoint that is quantized, whose tensors are no values, unless ``packed`` says that they are wanted.
        """
        if not packed and _is_quantized(directory):
            raise VerificationError(
                "the checkpoint is quantized, and the weights before that are needed here",
                where=str(directory),
                fix="use the original model as model.id",
            )
        if (directory / INDEX).is_file():
            return cls._indexed(directory)
        if (directory / SINGLE).is_file():
            return cls(directory, (SINGLE,))
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        found = f"only pickled weights ({pickled[0]})" if pickled else "no weights"
        raise VerificationError(
            f"the model has {found}, but weights are read from safetensors alone",
            where=str(directory),
            fix="use a revision with safetensors, or convert the weights with transformers' save_pretrained",
        )

    @classmethod
    def _indexed(cls, directory: Path) -> Self:
        where = str(directory / INDEX)
        try:
            placement = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = tuple(sorted(set(placement.values())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VerificationError(f"the index of the shards is damaged: {error}", where=where, fix="download the model again") from error
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise VerificationError(f"the index names {file!r}, which is no safetensors file beside it", where=where)
        weights = cls(directory, files)
        actual = {name: info.file for name, info in weights.info.items()}
        wrong = sorted(name for name in placement.keys() | actual.keys() if placement.get(name) != actual.get(name))
        if wrong:
            weights.close()
            raise VerificationError(
                f"{len(wrong)} tensors are not where the index says, {wrong[0]} first", where=where, fix="download the model again"
            )
        return weights

    def _add(self, file: str) -> None:
        path = self.directory / file
        try:
            handle = self._reopen(file)
            self.metadata.update(handle.metadata() or {})
            names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise VerificationError(
                f"the file is missing or damaged: {error}", where=str(path), fix="restore it, or download the model again"
            ) from error
        for name in names:
            if name in self._info:
                raise VerificationError(f"{name} is in {self._info[name].file} too", where=str(path), fix="download the model again")
            view = handle.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise VerificationError(
                    f"{name} has the type {view.get_dtype()}, which is not supported", where=str(path), fix="use an unquantized base model"
                )
            self._info[name] = TensorInfo(file, tuple(view.get_shape()), _DTYPES[view.get_dtype()])

    @property
    def info(self) -> Mapping[str, TensorInfo]:
        """Every tensor's place, shape and type by name, without reading any."""
        return self._info

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` as it is stored. VerificationError: there is none, or its bytes cannot be read."""
        info = self._info.get(name)
        if info is None:
            raise VerificationError(
                f"there is no tensor {name}", where=str(self.directory), fix="check that the base model is the one the adapter was made for"
            )
        try:
            handle = self._handles[info.file] if self._mapped[info.file] < _MAPPED_BYTES else self._reopen(info.file)
            tensor: Tensor = handle.get_tensor(name)
            self._mapped[info.file] += tensor.nbytes
        except (SafetensorError, OSError) as error:
            raise VerificationError(f"{name} cannot be read: {error}", where=str(self.directory / info.file)) from error
        return tensor

    def _reopen(self, file: str) -> Any:
        """Map ``file`` anew. Pages that were read stay in a mapping, so that a long-lived one grows to the size of the file."""
        handle = safe_open(str(self.directory / file), framework="pt")
        self._handles[file], self._mapped[file] = handle, 0
        return handle

    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()
