"""Targets as models that can be scored: the base of each, and what was trained on it; with an adapter both from one copy of the weights.

An adapter is loaded strictly (pitfall A4): its manifest must verify, every tensor must be used, the base must be the one it was trained on,
and with the adapter on the model must compute something else than with it off.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import Config, Evaluation, NoQuantization, Quantization
from finetune.data.general import general_blocks
from finetune.data.render import Example, Renderer
from finetune.errors import ConfigError, VerificationError
from finetune.evaluation.results import LOFTQ_BASE
from finetune.evaluation.targets import EXPECTED, Target, nearest
from finetune.finished import FinishedRun, base_of_adapter, load_run
from finetune.model.adapters import load
from finetune.model.builtin import BUILTIN, HUB_ID, fingerprint, resolve_model
from finetune.model.correction import FILE as LOFTQ_FILE
from finetune.model.load import DTYPES, load_base, load_tokenizer, require_vocabulary
from finetune.model.loftq import restore_base
from finetune.model.packed import stored_quantization
from finetune.model.start import before_training
from finetune.model.tokens import enlarge, token_ids
from finetune.runs import open_run
from finetune.scoring import Scorer
from finetune.sealed import COPY_AGAIN, MANIFEST, read_json, sha256_of, verify

_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Of a batch, where nothing says otherwise; what training takes too."""
_PROBE_TOKENS = 32
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class System:
    """One model under test."""

    scorer: Scorer
    renderer: Renderer
    using: Callable[[], AbstractContextManager[object]]
    """Context in which the scorer's model is this system (the base is the tuned model with its adapter set back)."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A target, loaded."""

    tuned: System
    """The target itself, trained or not."""
    record: dict[str, Any]
    """What the target is, so that it can be had again."""
    base: Callable[[], System] | None = None
    """The model before training; a second copy of the weights after full tuning alone. None of a plain model."""
    base_identity: str = ""
    """Equal for targets whose bases compute the same."""
    notes: tuple[str, ...] = ()


def open_target(target: Target, config: Config | None, settings: Evaluation, base: str | None = None) -> Opened:
    """Load ``target``. ``config``: of a run. ``base``: the model under adapters that do not know theirs."""
    match target.kind:
        case "run":
            assert config is not None
            return _run(target.path, config, settings)
        case "adapter":
            return _adapter(target.path, settings, base)
        case "model":
            return _model(target, settings)


# --- runs ----------------------------------------------------------------------------------------------------------------------------


def _run(path: Path, config: Config, settings: Evaluation) -> Opened:
    finished = load_run(open_run(path), config)

    def system(model: Any, using: Callable[[], AbstractContextManager[object]]) -> System:
        found = finished.scorer(model)
        tokens = found.max_tokens if settings.tokens_per_device == "auto" else settings.tokens_per_device
        return System(Scorer(model, found.device, found.precision, tokens), finished.renderer, using)

    def base() -> System:
        return system(*finished.untrained())

    tuned = system(finished.model, nullcontext)
    if finished.directory.name == "adapter":
        _require_effect(tuned, base())
    identity = [fingerprint(finished.base), config.quantization.model_dump_json(), str(finished.base_dtype), tuned.scorer.precision]
    identity += [*config.model.new_tokens, str(path.resolve()) if finished.loftq else ""]
    notes = (LOFTQ_BASE,) if finished.loftq else ()
    return Opened(tuned, _run_record(path, config, finished), base, "\n".join(identity), notes)


def _run_record(path: Path, config: Config, finished: FinishedRun) -> dict[str, Any]:
    return {
        "kind": "run",
        "path": str(path.resolve()),
        "run_id": read_json(open_run(path).environment)["run_id"],
        "base": config.model.id,
        "revision": config.model.revision,
        "base_fingerprint": fingerprint(finished.base),
        "weights_sha256": {file.name: sha256_of(file) for file in sorted(finished.directory.glob("*.safetensors"))},
        "computed_in": finished.resolved.types(),
    }


# --- adapters without their run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Base:
    """What an adapter says of the model it was trained on."""

    model: str
    revision: str | None
    fingerprint: str | None
    quantization: Quantization
    dtype: str | None
    new_tokens: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _adapter(path: Path, settings: Evaluation, base: str | None) -> Opened:
    if (path / MANIFEST).is_file():
        verify(path, COPY_AGAIN)
    stated = _stated_base(path, base)
    directory = _found_base(stated, path)
    if stated.fingerprint not in (None, fingerprint(directory)):
        raise VerificationError(
            "the base model is not the one this adapter was trained on", where=str(directory), fix="name the right one with --base"
        )
    device = _device()
    precision = _precision(settings, stated.dtype or _stored(directory))
    tokenizer = load_tokenizer(path if (path / "tokenizer_config.json").is_file() else directory)
    model = load_base(directory, stated.quantization, DTYPES[precision], device)
    enlarge(model, token_ids(tokenizer, stated.new_tokens))
    require_vocabulary(tokenizer, model)
    loftq = (path / LOFTQ_FILE).is_file()
    if loftq:
        restore_base(model, path, directory, stated.quantization, DTYPES[precision])
    model = load(model, path).eval()
    scorer = Scorer(model, device, precision, _tokens(settings, device))
    renderer = Renderer(tokenizer)
    tuned = System(scorer, renderer, nullcontext)
    plain = System(scorer, renderer, lambda: before_training(model, path, loftq=loftq))
    _require_effect(tuned, plain)
    identity = [fingerprint(directory), stated.quantization.model_dump_json(), str(DTYPES[precision]), precision, *stated.new_tokens]
    identity.append(str(path.resolve()) if loftq else "")
    record = {
        "kind": "adapter",
        "path": str(path.resolve()),
        "base": stated.model,
        "revision": stated.revision,
        "base_fingerprint": fingerprint(directory),
        "weights_sha256": {_WEIGHTS: sha256_of(path / _WEIGHTS)},
        "quantization": stated.quantization.model_dump(mode="json"),
        "computed_in": {"precision": precision},
    }
    notes = (*stated.notes, LOFTQ_BASE) if loftq else stated.notes
    return Opened(tuned, record, lambda: plain, "\n".join(identity), notes)


def _stated_base(path: Path, given: str | None) -> _Base:
    """What the adapter's own records say; of an adapter that another tool made, the name of its base alone."""
    known = base_of_adapter(path)
    if known is not None:
        of = (given or known.id, None if given else known.revision, known.fingerprint)
        return _Base(*of, known.quantization, known.dtype, known.new_tokens)
    config = read_json(path / _CONFIG)
    name = given or config.get("base_model_name_or_path")
    if not name:
        raise ConfigError("the adapter does not say what its base is", where=str(path), fix="name it with --base")
    note = f"{path.name}: it does not record which weights it was trained on, nor how they were quantized; measured on {name} as stored"
    return _Base(str(name), None if given else config.get("revision"), None, NoQuantization(), None, notes=(note,))


def _found_base(stated: _Base, path: Path) -> Path:
    """Its directory; the embedded model is known by its hub id too."""
    try:
        return resolve_model(BUILTIN if stated.model == HUB_ID else stated.model, stated.revision)
    except ConfigError as error:
        raise ConfigError(
            f"the base model of the adapter cannot be had: {error.problems[0].what}",
            where=f"{path}: {stated.model}",
            fix="name another copy of it with --base",
        ) from error


# --- plain models --------------------------------------------------------------------------------------------------------------------


def model_directory(target: Target) -> Path:
    """Where the files of a plain model are; ConfigError where ``target`` names none that can be had."""
    try:
        return resolve_model(target.model_id, target.revision)
    except ConfigError as error:
        if target.path.is_dir() or target.word.startswith("builtin:"):
            raise
        problem = error.problems[0]
        if "/" in target.word:
            raise ConfigError(problem.what, where=target.word, fix=nearest(target.path) or problem.fix) from error
        what = f"{target.word} is no directory here, and no model that the hub or its cache gives"
        raise ConfigError(what, where=target.word, fix=nearest(target.path) or EXPECTED) from error


def _model(target: Target, settings: Evaluation) -> Opened:
    """A plain model, such as a merged one, in the type it is stored in: what is measured is what would be served."""
    directory = model_directory(target)
    device = _device()
    precision = _precision(settings, _stored(directory))
    tokenizer = load_tokenizer(directory)
    model = load_base(directory, NoQuantization(), DTYPES[precision], device)
    require_vocabulary(tokenizer, model)
    record = {
        "kind": "model",
        "path": str(directory.resolve()),
        "model": target.model_id,
        "revision": target.revision,
        "base_fingerprint": fingerprint(directory),
        "computed_in": {"precision": precision},
    }
    stored = stored_quantization(directory)
    if stored is not None:
        record["quantization"] = stored.model_dump(mode="json")
    return Opened(System(Scorer(model, device, precision, _tokens(settings, device)), Renderer(tokenizer), nullcontext), record)


def _stored(directory: Path) -> str:
    """fp16 values are exact in fp32."""
    return "bf16" if read_json(directory / "config.json").get("dtype") == "bfloat16" else "fp32"


def _precision(settings: Evaluation, stored: str) -> str:
    return stored if settings.precision == "auto" else settings.precision


def _tokens(settings: Evaluation, device: torch.device) -> int:
    return _TOKENS[device.type] if settings.tokens_per_device == "auto" else settings.tokens_per_device


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _require_effect(tuned: System, base: System) -> None:
    """VerificationError where the model computes the same with its adapter as without: it is not applied, or was never trained."""
    text = general_blocks(tuned.renderer)[0]
    probe = Example(text.ids[:_PROBE_TOKENS], text.mask[:_PROBE_TOKENS], text.where)
    losses = []
    for system in (tuned, base):
        with system.using():
            losses += [found for _, found in system.scorer.losses([probe])]
    if torch.equal(*losses):
        raise VerificationError(
            "the adapter changes nothing: with it on and off the model computes the same",
            where="adapter",
            fix="train it further, or restore its weights from a copy",
        )
