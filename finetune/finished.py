"""A finished run, loaded again from its directory: what evaluation and merging start from, today or on another machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from finetune.config.schema import Config, Full, LoftqInit, Lora, NoQuantization, Quantization
from finetune.data.render import Example, Renderer
from finetune.data.stored import load_rows
from finetune.errors import VerificationError
from finetune.hardware import detect
from finetune.model.adapters import load
from finetune.model.builtin import fingerprint, resolve_model
from finetune.model.fast import accelerate
from finetune.model.load import load_base, load_tokenizer, storage_dtype
from finetune.model.loftq import restore_base
from finetune.model.start import before_training
from finetune.model.tokens import enlarge, token_ids
from finetune.planning.resolve import Resolved, resolve
from finetune.runs import RunDirectory, recorded_base
from finetune.scoring import Scorer
from finetune.sealed import read_json, sha256_of

_FULL = torch.float32
"""Weights that were all tuned."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """The tuned model of a run on the base it was trained on."""

    config: Config
    directory: Path
    """`adapter/`, or `model/` after full tuning."""
    base: Path
    """Directory of the base model."""
    model: Any
    """The tuned model, in eval mode."""
    renderer: Renderer
    rows: Sequence[Example]
    """Validation rows; training rows where the run had none."""
    has_validation: bool
    resolved: Resolved
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """What the base was loaded in, and quantized weights were dequantized to."""
        return storage_dtype(self.config.quantization, self.resolved)

    @property
    def base_dtype(self) -> torch.dtype:
        """What the weights of `untrained` are in: after full tuning, as the tuned ones."""
        return _FULL if isinstance(self.config.tuning, Full) else self.dtype

    @property
    def loftq(self) -> bool:
        """Whether the adapter started from LoftQ instead of zero."""
        return isinstance(self.config.tuning, Lora) and isinstance(self.config.tuning.init, LoftqInit)

    def scorer(self, model: Any) -> Scorer:
        """A scorer of ``model`` that computes as the run did."""
        return Scorer(model, self.device, self.resolved.precision.value, self.resolved.tokens_per_device.value)

    def untrained(self) -> tuple[Any, Callable[[], AbstractContextManager[object]]]:
        """The model before its first step, as (model, context to use it in): the tuned one with its adapter set back, or a second copy."""
        if not isinstance(self.config.tuning, Full):
            return self.model, lambda: before_training(self.model, self.directory, loftq=self.loftq)
        # in the type that the tuned weights are loaded in: else what rounding does would pass for what was learned
        base = _untuned(self.config, self.base, self.dtype, self.device, self.renderer).to(self.base_dtype)
        return _as_trained(base, self.config), nullcontext


@dataclass(frozen=True, slots=True)
class RecordedBase:
    """What the record beside an adapter says of the model it belongs to."""

    id: str
    revision: str | None
    fingerprint: str
    quantization: Quantization
    dtype: str
    """`bf16` or `fp32`."""
    new_tokens: tuple[str, ...]


def base_of_adapter(path: Path) -> RecordedBase | None:
    """The record in the adapter directory ``path``; None where there is none, VerificationError where it is damaged."""
    known = recorded_base(path)
    if known is None:
        return None
    try:
        if known["dtype"] not in ("bf16", "fp32"):
            raise ValueError(f"dtype {known['dtype']!r}")
        quantization = TypeAdapter[Quantization](Quantization).validate_python(known["quantization"])
        return RecordedBase(known["id"], known["revision"], known["fingerprint"], quantization, known["dtype"], tuple(known["new_tokens"]))
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError(
            f"the record of the adapter's base is damaged: {error}", where=str(path), fix="copy the adapter again"
        ) from error


def load_run(run: RunDirectory, config: Config) -> FinishedRun:
    """Load a finished ``run``; every file, tensor and fingerprint is checked (pitfall A4).

    ConfigError where the run is not finished, VerificationError where anything is not what was trained.
    """
    directory = run.require_finished()
    base = resolve_model(config.model.id, config.model.revision)
    records = read_json(run.environment)
    if fingerprint(base) != records["identity"]["fingerprints"]["base"]:
        raise VerificationError(
            "the base model is not the one this run was trained on", where=str(base), fix="restore it, or pin model.revision as it was"
        )
    if sha256_of(run.rows) != records["rows_sha256"]:
        raise VerificationError("the run's validation rows are not those it was validated on", where=str(run.rows), fix="restore the file")
    rows, has_validation = load_rows(run.rows)
    resolved = resolve(config, detect()).pinned(**records["computed_in"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    renderer = Renderer(load_tokenizer(directory))  # with the tokens that were added
    dtype = storage_dtype(config.quantization, resolved)
    if isinstance(config.tuning, Full):
        model = load_base(directory, NoQuantization(), _FULL, device)  # as it was trained and stored
    else:
        model = _untuned(config, base, dtype, device, renderer)
        if isinstance(config.tuning, Lora) and isinstance(config.tuning.init, LoftqInit):
            restore_base(model, directory, base, config.quantization, dtype)
        model = load(model, directory).eval()
    return FinishedRun(config, directory, base, _as_trained(model, config), renderer, rows, has_validation, resolved, device)


def _untuned(config: Config, base: Path, dtype: torch.dtype, device: torch.device, renderer: Renderer) -> Any:
    """The base as the run loaded it, with rows for the tokens that were added."""
    model = load_base(base, config.quantization, dtype, device)
    enlarge(model, token_ids(renderer.tokenizer, config.model.new_tokens))
    return model


def _as_trained(model: Any, config: Config) -> Any:
    """``model`` computing with the kernels of the run, so that what is measured is what was validated while it trained."""
    if config.train.kernels == "auto":
        accelerate(model, config.tuning)
    return model
