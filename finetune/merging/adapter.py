"""An adapter directory, read strictly: every tensor and every switch is understood, or the adapter is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from finetune.errors import Problem, VerificationError
from finetune.merging.formats import SHARED_A, SHARED_B, Format, format_of, unsupported
from finetune.merging.updates import Scaling, Update
from finetune.model.weights import Weights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Rows:
    """Trained rows of an embedding or a head."""

    key: str
    ids: tuple[int, ...]
    """Row i of the tensor replaces row ids[i] of the weight."""


@dataclass(slots=True)
class Adapter:
    """The tensors of an adapter by what they do; a context manager."""

    directory: Path
    updates: dict[str, Update] = field(default_factory=dict)
    """By module name in the base model."""
    copies: dict[str, str] = field(default_factory=dict)
    """Whole trained tensors: name in the base model -> key in the adapter."""
    rows: dict[str, Rows] = field(default_factory=dict)
    """Trained rows by the name of the weight in the base model."""
    keeps_tie: bool = False
    """Whether a tied pair of embedding and head was trained as one parameter, of which the file holds two copies."""
    _weights: Weights = field(init=False)
    _taken: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Read the configuration and the names. VerificationError: a feature, a tensor or a file that cannot be merged."""
        for name in (CONFIG, WEIGHTS):
            if (self.directory / name).is_symlink():
                raise VerificationError(f"{name} is a symbolic link", where=str(self.directory), fix="copy the adapter's files")
        config = _read_config(self.directory / CONFIG)
        form = _supported(config, self.directory / CONFIG)
        self._weights = Weights(self.directory, (WEIGHTS,))
        try:
            with located(self._where):
                self._sort(config, form)
        except BaseException:
            self._weights.close()
            raise

    @property
    def _where(self) -> str:
        return str(self.directory / WEIGHTS)

    def _sort(self, config: Mapping[str, Any], form: Format) -> None:
        self.keeps_tie = bool(config.get("ensure_weight_tying"))
        parts: dict[str, dict[str, str]] = {}
        unknown = []
        for key in self._weights.info:
            name = key.removeprefix(_PREFIX)
            suffix = next((suffix for suffix in form.parts if name.endswith(suffix)), None)
            if suffix and (key.startswith(_PREFIX) or "format" in config):
                parts.setdefault(name.removesuffix(suffix), {})[form.parts[suffix]] = key
            elif key.startswith(_PREFIX) and self._is_saved_copy(name, config):
                self.copies[name] = key
            elif key not in (SHARED_A, SHARED_B) or config.get("peft_type") != "VERA":
                unknown.append(key)
        if unknown:
            raise VerificationError(f"the adapter holds {len(unknown)} tensors of no known use, {unknown[0]} first")
        for module, keys in parts.items():
            self._add(module, keys, config, form)
        self._require_meaningful(config)

    def _is_saved_copy(self, name: str, config: Mapping[str, Any]) -> bool:
        # beside a tied embedding its head is filed too, which modules_to_save does not list
        return self.keeps_tie or any(name.rpartition(".")[0].endswith(saved) for saved in config.get("modules_to_save") or ())

    def _add(self, module: str, keys: dict[str, str], config: Mapping[str, Any], form: Format) -> None:
        """File the parts of ``module`` under what they do."""
        for part in [part for part in keys if part.startswith(".")]:
            self.copies[module + part] = keys.pop(part)
        if "rows" in keys:
            self.rows[f"{module}.weight"] = self._rows(module, keys.pop("rows"), config)
        if keys:
            self.updates[module] = form.update(module, keys, config, self.shape)

    def _rows(self, module: str, key: str, config: Mapping[str, Any]) -> Rows:
        stated = config.get("trainable_token_indices") or {}
        ids = next((found for name, found in stated.items() if _ends(module, name)), None) if isinstance(stated, Mapping) else stated
        if not ids or self.shape(key)[:1] != (len(ids),) or len(set(ids)) != len(ids):
            raise VerificationError(f"{key} has the shape {self.shape(key)}, against trainable_token_indices {ids}")
        return Rows(key, tuple(map(int, ids)))

    def _require_meaningful(self, config: Mapping[str, Any]) -> None:
        """Every switch that is set has its tensors, and there is at least one tensor."""
        if not self.updates and not self.copies and not self.rows:
            raise VerificationError("the adapter is empty", fix="train again")
        stated = config.get("trainable_token_indices") or ()
        if (len(stated) if isinstance(stated, Mapping) else min(len(stated), 1)) != len(self.rows):
            raise VerificationError(f"the adapter holds rows for {len(self.rows)} modules, against trainable_token_indices {stated}")
        if self.keeps_tie and not self.copies:
            raise VerificationError(
                "the adapter uses ensure_weight_tying, which cannot be merged but for whole copies",
                fix="merge it with the tool that made it",
            )

    def touches(self, name: str) -> bool:
        """Whether the adapter changes the weight ``name``."""
        module, _, part = name.rpartition(".")
        update = self.updates.get(module)
        scaled = part == "bias" and isinstance(update, Scaling) and not update.of_inputs
        return name in self.copies or name in self.rows or scaled or (part == "weight" and update is not None)

    def touched(self, names: Iterable[str]) -> set[str]:
        """Those of the weights ``names`` that the adapter changes, and whatever it changes that is not among them."""
        scaled = {f"{module}.bias" for module, update in self.updates.items() if isinstance(update, Scaling) and not update.of_inputs}
        return {f"{module}.weight" for module in self.updates} | set(self.copies) | set(self.rows) | (scaled & set(names))

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it; VerificationError where there is none."""
        if key not in self._weights.info:
            raise VerificationError(f"the adapter lacks the tensor {key}", where=self._where)
        return self._weights.info[key].shape

    def take(self, key: str, target: str) -> Tensor:
        """Read a tensor in fp32 for its one use in ``target``. VerificationError: it holds NaN or infinity, or was used there before."""
        if (key, target) in self._taken:
            raise VerificationError(f"{key} would be merged twice into {target}", where=self._where)
        self._taken.add((key, target))
        tensor = self._weights.read(key).float()
        if not tensor.isfinite().all():
            raise VerificationError(f"{key} holds NaN or infinity", where=self._where, fix="use an earlier checkpoint")
        return tensor

    def release(self, target: str) -> None:
        """Let the tensors that were used in ``target`` be read for it again: where one weight takes several passes."""
        self._taken = {use for use in self._taken if use[1] != target}

    def require_all_taken(self) -> None:
        """VerificationError where a tensor of the adapter was not merged."""
        left = sorted(set(self._weights.info) - {key for key, _ in self._taken})
        if left:
            raise VerificationError(
                f"{len(left)} adapter tensors found no place in the base model, {left[0]} first",
                where=self._where,
                fix="merge with the base model that the adapter was trained on",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self._weights.close()


@contextmanager
def located(where: str) -> Iterator[None]:
    """Give every problem inside the block that has no place the place ``where``."""
    try:
        yield
    except VerificationError as error:
        raise VerificationError.from_problems(
            problem if problem.where else replace(problem, where=where) for problem in error.problems
        ) from error


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


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


def _supported(config: Mapping[str, Any], path: Path) -> Format:
    """The kind of adapter, once every switch whose effect on the weights is not implemented, known or not, was refused."""
    found, form = unsupported(config), format_of(config)
    if found or form is None:
        raise VerificationError.from_problems(
            Problem(f"the adapter uses {feature}, which cannot be merged", str(path), "merge it with the tool that made it")
            for feature in found
        )
    return form
