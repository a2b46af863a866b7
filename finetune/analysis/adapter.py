"""The updates in an adapter's files, as thin factors: strictly, so that no tensor is taken for another or left out unseen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from finetune.errors import VerificationError
from finetune.model.correction import FILE as CORRECTION
from finetune.model.correction import Corrections
from finetune.model.weights import Weights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_A": "a",
    ".lora_B.weight": "b",
    ".lora_B": "b",
    ".lora_E": "e",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_SETS = (
    frozenset({"a", "b"}),
    frozenset({"a", "b", "e"}),
    frozenset({"a", "b", "magnitude"}),
    frozenset({"embedding_a", "embedding_b"}),
    frozenset({"embedding_a", "embedding_b", "magnitude"}),
)
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class Update:
    """What training added to one weight: left times the transpose of right."""

    module: str
    left: Tensor
    """(d_out, k) fp32, the scale s included."""
    right: Tensor
    """(d_in, k) fp32"""
    rank: int
    """Directions that could train: r, or what was kept of a whole update. With a start to subtract, k is twice as large."""
    a: Tensor | None = None
    """A (r, d_in) where it was drawn at random and B began at zero, as in the paper; else None."""
    magnitude: Tensor | None = None
    """DoRA's trained norms, (d_out,); for an embedding (d,)."""
    embedding: bool = False
    norm: float | None = None
    """Frobenius norm of the whole update where the factors are its largest directions alone."""


class AdapterFile:
    """An adapter of PEFT's LoRA or AdaLoRA; a context manager.

    Where LoftQ's start lies beside it the update is s(BA - B0 A0), what training did. PiSSA and OLoRA runs export exactly this
    difference as a plain adapter of rank 2r on the untouched base.
    """

    def __init__(self, directory: Path, *, loftq: bool, doubled: bool) -> None:
        """Read the configuration and the names.

        ``loftq``: LoftQ's file must be there. ``doubled``: half of the stored rank stands for the start, so it is not counted as rank.
        VerificationError: a feature or tensor of no known meaning, or a damaged file.
        """
        self.directory = directory
        self._doubled = doubled
        self._config = _read_config(directory / CONFIG)
        self._weights = Weights(directory, (WEIGHTS,))
        self._corrections: Corrections | None = None
        try:
            self.other: tuple[str, ...] = ()
            """Tensors that train as a whole, such as a copy of the embedding: no factors, so they are not analyzed."""
            self._parts = self._sorted()
            self._corrections = Corrections(directory) if loftq else None
            if not loftq and (directory / CORRECTION).exists():
                raise VerificationError(f"{CORRECTION} lies beside an adapter whose run did not use LoftQ", where=str(directory))
        except BaseException:
            self.close()
            raise

    def _sorted(self) -> dict[str, dict[str, str]]:
        """Keys by module and part."""
        parts: dict[str, dict[str, str]] = {}
        other, unknown = [], []
        for key in self._weights.info:
            name = key.removeprefix(_PREFIX)
            suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
            if suffix and key.startswith(_PREFIX):
                parts.setdefault(name.removesuffix(suffix), {})[_PARTS[suffix]] = key
            elif self._is_whole(name):
                other.append(name)
            else:
                unknown.append(key)
        unknown += [key for found in parts.values() if frozenset(found) not in _SETS for key in found.values()]
        if unknown or not (parts or other):
            what = f"{len(unknown)} tensors of no known use, {unknown[0]} first" if unknown else "nothing"
            raise VerificationError(f"the adapter holds {what}", where=str(self.directory / WEIGHTS), fix="analyze the run's own adapter")
        self.other = tuple(other)
        return dict(sorted(parts.items()))

    def _is_whole(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        saved = self._config.get("modules_to_save") or ()
        if saved and self._config.get("ensure_weight_tying") and "." not in module:
            return True  # the output head, which the file repeats where it is tied to a trained embedding
        return name.endswith(".trainable_tokens_delta") or any(module == one or module.endswith(f".{one}") for one in saved)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules with an update, sorted."""
        return tuple(self._parts)

    def updates(self) -> Iterator[Update]:
        """The update of every module, one in memory at a time."""
        for module in self._parts:
            yield self.read(module)

    def read(self, module: str) -> Update:
        """The update of ``module``; VerificationError where its factors do not fit each other or hold NaN or infinity."""
        found = {part: self._tensor(key) for part, key in self._parts[module].items()}
        embedding = "embedding_a" in found
        a, b = (found["embedding_a"], found["embedding_b"]) if embedding else (found["a"], found["b"])
        rank = a.shape[0]
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != rank:
            raise VerificationError(
                f"the factors of {module} have the shapes {tuple(a.shape)} and {tuple(b.shape)}", where=str(self.directory / WEIGHTS)
            )
        scale = self._scale(module, rank)
        weighed = a * found["e"] if "e" in found else a
        left, right = (a.T * scale, b) if embedding else (b * scale, weighed.T)
        start = self._corrections.read(module).start if self._corrections and module in self._corrections.modules else None
        if start is not None:
            left, right = torch.cat([left, start.b * -start.scale], 1), torch.cat([right, start.a.T], 1)
        plain = start is None and not self._doubled and not embedding and "e" not in found
        trained = max(1, rank // 2) if self._doubled else rank
        return Update(module, left, right, trained, a if plain else None, found.get("magnitude"), embedding)

    def start(self, module: str, weight: Tensor) -> Tensor:
        """``weight`` (d_out, d_in), the base of ``module``, with what the adapter began as."""
        if self._corrections is None or module not in self._corrections.modules:
            return weight
        return self._corrections.read(module).start.added_to(weight)

    def _tensor(self, key: str) -> Tensor:
        tensor = self._weights.read(key).float()
        if not tensor.isfinite().all():
            raise VerificationError(f"{key} holds NaN or infinity", where=str(self.directory / WEIGHTS), fix="use an earlier checkpoint")
        return tensor

    def _scale(self, module: str, rank: int) -> float:
        """s, with the patterns matched as PEFT matches them."""
        config = self._config
        if config["peft_type"] == "ADALORA":
            return float(config["lora_alpha"]) / (rank + 1e-5)  # as PEFT computes it
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        stated = int(ranks.get(get_pattern_key(list(ranks), module), config["r"]))
        if stated != rank:
            raise VerificationError(f"the factors of {module} have rank {rank}, not {stated}", where=str(self.directory / WEIGHTS))
        alpha = float(alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def close(self) -> None:
        """Close the files."""
        self._weights.close()
        if self._corrections:
            self._corrections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, init = config["peft_type"], config.get("init_lora_weights", True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"cannot read the adapter's configuration: {error!r}", where=str(path), fix="train again") from error
    if kind not in ("LORA", "ADALORA"):
        raise VerificationError(f"peft_type {kind!r} has no low-rank factors", where=str(path), fix="analyze a run of `method: lora`")
    if init not in _HARMLESS_INITS:
        raise VerificationError(
            f"the adapter began as {init!r}, which changes its base, and the start is not here to be taken away",
            where=str(path),
            fix="analyze the adapter that the run exported",
        )
    return dict(config)
