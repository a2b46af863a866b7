"""The models that are compared: the base, the tuned one, and further directories, each as something that can be scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import Config, LoftqInit, Lora, NoQuantization
from finetune.data.render import Renderer
from finetune.errors import ConfigError, VerificationError
from finetune.hardware import detect
from finetune.model.adapters import load
from finetune.model.builtin import fingerprint, resolve_model
from finetune.model.load import DTYPES, load_base, load_tokenizer
from finetune.model.loftq import restore_base
from finetune.planning.resolve import Resolved, resolve
from finetune.runs import RunDirectory, read_json
from finetune.scoring import Scorer


@dataclass(frozen=True, slots=True)
class System:
    """One model under test."""

    name: str
    """``base``, ``tuned``, or the directory's name."""
    scorer: Scorer
    using: Callable[[], AbstractContextManager[object]]
    """Context in which the scorer's model is this system (the base is the tuned model with its adapter switched off)."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A finished run, ready to be measured."""

    renderer: Renderer
    resolved: Resolved
    model: Any
    """The tuned model."""
    base: Path
    """Directory of the base model."""
    device: torch.device

    def scorer(self, model: Any) -> Scorer:
        """A scorer of ``model`` that computes as the run did."""
        return Scorer(model, self.device, self.resolved.precision.value, self.resolved.tokens_per_device.value)


def load_run(run: RunDirectory, config: Config) -> Loaded:
    """The tuned model of a finished ``run`` on the base it was trained on; every file and fingerprint is checked (pitfall A4)."""
    directory = run.trained()
    if directory is None:
        raise ConfigError(
            "the run is not finished: it has no adapter", where=str(run.path), fix="finish it with `finetune train CONFIG --resume`"
        )
    base = resolve_model(config.model.id, config.model.revision)
    recorded = read_json(run.environment)["identity"]["fingerprints"]["base"]
    if fingerprint(base) != recorded:
        raise VerificationError(
            "the base model is not the one this run was trained on", where=str(base), fix="restore it, or pin model.revision as it was"
        )
    resolved = resolve(config, detect())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _tuned(config, directory, base, resolved, device)
    return Loaded(Renderer(load_tokenizer(directory)), resolved, model, base, device)


def model_dtype(config: Config, resolved: Resolved) -> torch.dtype:
    """The type of the base's unquantized weights, and what quantized ones are dequantized to."""
    return DTYPES[resolved.precision.value if config.quantization.method == "none" else resolved.compute_dtype.value]


def _tuned(config: Config, directory: Path, base: Path, resolved: Resolved, device: torch.device) -> Any:
    dtype = model_dtype(config, resolved)
    if not isinstance(config.tuning, Lora):
        return load_base(directory, NoQuantization(), dtype, device)
    model = load_base(base, config.quantization, dtype, device)
    if isinstance(config.tuning.init, LoftqInit):
        restore_base(model, directory, base, config.quantization, dtype)
    return load(model, directory).eval()


def base_and_tuned(loaded: Loaded, config: Config) -> list[System]:
    """The two systems of every run: one copy of the weights where switching the adapter off gives the base."""
    tuned = loaded.scorer(loaded.model)
    if isinstance(config.tuning, Lora) and not (isinstance(config.tuning.init, LoftqInit) and config.tuning.init.iterations > 1):
        return [System("base", tuned, loaded.model.disable_adapter), System("tuned", tuned, _as_it_is)]
    # Full tuning changed the weights, and LoftQ's later iterations changed the quantized base: the base is loaded apart (pitfall A18).
    dtype = model_dtype(config, loaded.resolved)
    base = loaded.scorer(load_base(loaded.base, config.quantization, dtype, loaded.device))
    return [System("base", base, _as_it_is), System("tuned", tuned, _as_it_is)]


def directory_system(loaded: Loaded, directory: Path) -> System:
    """A plain model directory, such as a merged one, in its own precision."""
    config = directory / "config.json"
    if not config.is_file():
        raise ConfigError(
            "not a model directory: config.json is missing", where=str(directory), fix="name a directory written by `finetune merge`"
        )
    model = load_base(directory, NoQuantization(), DTYPES["fp32" if loaded.resolved.precision.value == "fp32" else "bf16"], loaded.device)
    return System(directory.name, loaded.scorer(model), _as_it_is)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
