"""An adapter directory as PEFT writes it, read strictly: every tensor and every switch is understood, or the adapter is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from peft.utils.other import get_pattern_key
from torch import Tensor

from finetune.errors import Problem, VerificationError
from finetune.model.weights import Weights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
}
_USED = {
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "peft_type",
    "init_lora_weights",
    "bias",
}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Starts that leave the base as it is. The others (pissa, olora, corda, ...) moved a part of the base into the adapter."""


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """A LoRA on one module: the keys of its tensors and its scale."""

    a: str
    b: str
    scale: float
    """s = alpha/r, or alpha/sqrt(r) for rsLoRA."""
    rank: int
    magnitude: str | None
    """DoRA's magnitude, where the adapter has one."""
    embedding: bool
    """Whether A is (r, vocabulary) and B (d, r), so that the update is s (BA)^T."""


@dataclass(slots=True)
class Adapter:
    """The tensors of an adapter by what they do; a context manager."""

    directory: Path
    updates: dict[str, LowRankUpdate] = field(default_factory=dict)
    """By module name in the base model."""
    copies: dict[str, str] = field(default_factory=dict)
    """Whole trained tensors: name in the base model -> key in the adapter."""
    _weights: Weights = field(init=False)
    _taken: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Read the configuration and the names. VerificationError: a feature, a tensor or a file that cannot be merged."""
        for name in (CONFIG, WEIGHTS):
            if (self.directory / name).is_symlink():
                raise VerificationError(f"{name} is a symbolic link", where=str(self.directory), fix="copy the adapter's files")
        config = _read_config(self.directory / CONFIG)
        _require_supported(config, self.directory / CONFIG)
        self._weights = Weights(self.directory, (WEIGHTS,))
        try:
            self._sort(config)
        except BaseException:
            self._weights.close()
            raise

    def _sort(self, config: dict[str, Any]) -> None:
        parts: dict[str, dict[str, str]] = {}
        unknown = []
        for key in self._weights.info:
            name = key.removeprefix(_PREFIX)
            suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
            if not key.startswith(_PREFIX):
                unknown.append(key)
            elif suffix:
                parts.setdefault(name.removesuffix(suffix), {})[_PARTS[suffix]] = key
            elif any(name.rpartition(".")[0].endswith(saved) for saved in config.get("modules_to_save") or ()):
                self.copies[name] = key
            else:
                unknown.append(key)
        if unknown:
            raise VerificationError(
                f"the adapter holds {len(unknown)} tensors of no known use, {unknown[0]} first", where=str(self.directory / WEIGHTS)
            )
        self.updates = {module: self._update(module, found, config) for module, found in parts.items()}
        if not self.updates and not self.copies:
            raise VerificationError("the adapter is empty", where=str(self.directory / WEIGHTS), fix="train again")

    def _update(self, module: str, keys: dict[str, str], config: dict[str, Any]) -> LowRankUpdate:
        embedding = "embedding_a" in keys
        expected = {"embedding_a", "embedding_b"} if embedding else {"a", "b"}
        expected |= {"magnitude"} if config.get("use_dora") else set()
        if set(keys) != expected:
            raise VerificationError(
                f"{module} has the parts {sorted(keys)} instead of {sorted(expected)}", where=str(self.directory / WEIGHTS)
            )
        a, b = (keys["embedding_a"], keys["embedding_b"]) if embedding else (keys["a"], keys["b"])
        rank, scale = _rank_and_scale(module, config)
        shapes = self._weights.info[a].shape, self._weights.info[b].shape
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][0] != rank or shapes[1][1] != rank:
            raise VerificationError(
                f"the factors of {module} have the shapes {shapes}, not rank {rank}", where=str(self.directory / WEIGHTS)
            )
        return LowRankUpdate(a, b, scale, rank, keys.get("magnitude"), embedding)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._weights.info[key].shape

    def take(self, key: str) -> Tensor:
        """Read a tensor in fp32 for its one use. VerificationError: it holds NaN or infinity, or was taken before."""
        self._taken[key] += 1
        if self._taken[key] > 1:
            raise VerificationError(f"{key} would be merged twice", where=str(self.directory / WEIGHTS))
        tensor = self._weights.read(key).float()
        if not tensor.isfinite().all():
            raise VerificationError(f"{key} holds NaN or infinity", where=str(self.directory / WEIGHTS), fix="use an earlier checkpoint")
        return tensor

    def require_all_taken(self) -> None:
        """VerificationError where a tensor of the adapter was not merged."""
        left = sorted(set(self._weights.info) - set(self._taken))
        if left:
            raise VerificationError(
                f"{len(left)} adapter tensors found no place in the base model, {left[0]} first",
                where=str(self.directory / WEIGHTS),
                fix="merge with the base model that the adapter was trained on",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self._weights.close()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise VerificationError(
            f"cannot read the adapter's configuration: {error}", where=str(path), fix="name an adapter directory"
        ) from error
    return config


def _require_supported(config: dict[str, Any], path: Path) -> None:
    """Refuse every switch whose effect on the weights is not implemented, known or not."""
    found = []
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type {config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']!r}")
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        found.append(f"init_lora_weights {config['init_lora_weights']!r}, which changes the base")
    # PEFT ignores loftq_config without its own init, which is refused above
    ignored = _USED | _WITHOUT_EFFECT | {"loftq_config"}
    found += [f"{key} {value!r}" for key, value in sorted(config.items()) if key not in ignored and value]
    if found:
        raise VerificationError.from_problems(
            Problem(f"the adapter uses {feature}, which cannot be merged", str(path), "merge it with the tool that made it")
            for feature in found
        )


def _rank_and_scale(module: str, config: dict[str, Any]) -> tuple[int, float]:
    """Rank and scale of ``module``, with the patterns matched as PEFT matches them."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = int(ranks.get(get_pattern_key(list(ranks), module), config["r"]))
    alpha = float(alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
