"""A finished run as a stream of updates, each with the weight it was added to. The model is never loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from finetune.analysis.adapter import AdapterFile, Update
from finetune.config.schema import AdaLora, Config, Full, LoftqInit, Lora, NoQuantization, OloraInit, PissaInit
from finetune.errors import VerificationError
from finetune.hardware import detect
from finetune.model.builtin import fingerprint, resolve_model
from finetune.model.correction import Corrections
from finetune.model.load import storage_dtype
from finetune.model.low_rank import truncated_svd
from finetune.model.quantize import quantized_modules, roundtrip
from finetune.model.weights import Weights
from finetune.planning.resolve import resolve
from finetune.runs import RunDirectory
from finetune.sealed import read_json

KEPT_OF_WHOLE = 64
"""Singular values that are computed of the update of a whole weight (full tuning)."""
_ROUNDING = 1e-6
"""Of the largest singular value: what a decomposition in fp32 cannot tell from zero, and whose directions mean nothing."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run's files, checked."""

    run: RunDirectory
    config: Config
    directory: Path
    """`adapter/` or `model/`."""
    base: Path
    dtype: torch.dtype
    """What the base was loaded in, and quantized weights were dequantized to."""

    @property
    def loftq(self) -> bool:
        """Whether the adapter began as LoftQ's correction."""
        return isinstance(self.config.tuning, Lora) and isinstance(self.config.tuning.init, LoftqInit)

    @property
    def exported(self) -> bool:
        """Whether the adapter was converted at the end from one that began inside the weight, which doubled its rank."""
        return isinstance(self.config.tuning, Lora) and isinstance(self.config.tuning.init, PissaInit | OloraInit)

    @property
    def measured(self) -> str:
        """What the update of a weight is, as a formula."""
        if isinstance(self.config.tuning, Full):
            return "W' - W"
        return "s(BA - B0 A0)" if self.loftq or self.exported else "s B Lambda A" if isinstance(self.config.tuning, AdaLora) else "s BA"


def open_trained(run: RunDirectory, config: Config) -> Trained:
    """The result of a ``run`` that `require_analyzable` passed. VerificationError: the base is not the one it was trained on."""
    directory = run.model if isinstance(config.tuning, Full) else run.adapter
    base = resolve_model(config.model.id, config.model.revision)
    records = read_json(run.environment)
    if fingerprint(base) != records["identity"]["fingerprints"]["base"]:
        raise VerificationError(
            "the base model is not the one this run was trained on", where=str(base), fix="restore it, or pin model.revision as it was"
        )
    resolved = resolve(config, detect()).pinned(**records["computed_in"])
    return Trained(run, config, directory, base, storage_dtype(config.quantization, resolved))


@dataclass(frozen=True, slots=True)
class Changed:
    """An update and what it was added to."""

    update: Update
    weight: Tensor
    """(d_out, d_in) fp32: the base as training computed with it, dequantized where it was quantized."""
    start: Tensor
    """``weight`` with the adapter as it began; the same tensor where that was nothing."""


def changes(trained: Trained, skipped: list[str]) -> Iterator[Changed]:
    """Every update of a run, one module in memory at a time; what was passed over is said in ``skipped``."""
    if isinstance(trained.config.tuning, Full):
        yield from _whole_changes(trained, skipped)
    else:
        yield from _adapter_changes(trained, skipped)


def _adapter_changes(trained: Trained, skipped: list[str]) -> Iterator[Changed]:
    with ExitStack() as stack:
        adapter = stack.enter_context(AdapterFile(trained.directory, loftq=trained.loftq, doubled=trained.exported))
        weights = stack.enter_context(Weights.of_model(trained.base))
        corrections = stack.enter_context(Corrections(trained.directory)) if trained.loftq else None
        base = _Base(trained, weights, corrections)
        if adapter.other:
            skipped.extend(_not_analyzed(adapter.other))
        for update in adapter.updates():
            weight = base.read(update.module)
            given = (update.left.shape[0], update.right.shape[0])
            if tuple(weight.shape) != given:
                raise VerificationError(
                    f"the update of {update.module} has the shape {given}, the base {tuple(weight.shape)}", where=str(trained.base)
                )
            yield Changed(update, weight, adapter.start(update.module, weight))


_NEW_ROWS = ".token_adapter.trainable_tokens_delta"


def _not_analyzed(others: Sequence[str]) -> Iterator[str]:
    """What trained beside the factors: the rows of new tokens, and copies of whole weights."""
    rows = [name.removesuffix(_NEW_ROWS) for name in others if name.endswith(_NEW_ROWS)]
    whole = [name for name in others if not name.endswith(_NEW_ROWS)]
    if rows:
        yield f"the rows of the new tokens were trained too and are not analyzed: {', '.join(rows)}"
    if whole:
        yield f"trained as a whole and not analyzed: {', '.join(whole)}"


class _Base:
    """The values that training computed with, weight by weight."""

    def __init__(self, trained: Trained, weights: Weights, corrections: Corrections | None) -> None:
        self._trained, self._weights, self._corrections = trained, weights, corrections
        config = AutoConfig.from_pretrained(trained.base, trust_remote_code=False, local_files_only=True)
        plain = isinstance(trained.config.quantization, NoQuantization)
        self._quantized: frozenset[str] = frozenset() if plain else quantized_modules(config)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def read(self, module: str) -> Tensor:
        """(d_out, d_in) fp32 on the CPU."""
        trained = self._trained
        stored = self._weights.read(f"{module}.weight")
        if module not in self._quantized:
            return stored.to(trained.dtype).float()
        before = self._corrections.read(module).base if self._corrections and module in self._corrections.modules else None
        source = before.added_to(stored, -1.0) if before is not None else stored
        return roundtrip(source, trained.config.quantization, trained.dtype, self._device).cpu()


def _whole_changes(trained: Trained, skipped: list[str]) -> Iterator[Changed]:
    """W' - W of every matrix that changed, by its largest directions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unchanged, vectors = 0, 0
    with Weights.of_model(trained.base) as before, Weights.of_model(trained.directory) as after:
        for name, info in after.info.items():
            module = name.removesuffix(".weight")
            if name not in before.info or len(info.shape) != 2 or not info.dtype.is_floating_point:
                vectors += 1
                continue
            weight = before.read(name).to(trained.dtype).float()
            delta = after.read(name).float()[: weight.shape[0]] - weight  # new tokens are rows that the base does not have
            if not delta.isfinite().all():
                raise VerificationError(f"{name} holds NaN or infinity", where=str(trained.directory), fix="use an earlier checkpoint")
            if not delta.any():
                unchanged += 1
                continue
            u, sigma, v = (part.cpu() for part in truncated_svd(delta.to(device), KEPT_OF_WHOLE))
            live = sigma > _ROUNDING * sigma[0]
            u, sigma, v = u[:, live], sigma[live], v[live]
            root = sigma.sqrt()
            yield Changed(
                Update(module, u * root, v.T * root, len(sigma), norm=float(delta.norm())),
                weight,
                weight,
            )
    for count, what in ((unchanged, "matrices did not change"), (vectors, "tensors are no matrices of the base (norms, biases)")):
        if count:
            skipped.append(f"{count} {what}")
