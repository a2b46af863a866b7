"""The adapters of a plan, found and checked: one base, one form of it, one vocabulary.

What an adapter changed is defined against where its training began. Runs on the plain model began at W; runs on a quantized one at Q, its
dequantized values; LoftQ runs at Q + s B0 A0. Updates may be added to one another where they began at one point, or on the original
weights, where each update is what training did, s(BA - B0 A0). PiSSA and OLoRA runs export exactly that, on W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetune.config.combine import Plan, weights_of
from finetune.config.load import load_config
from finetune.config.schema import Config, FourBit, Full, Houlsby, LoftqInit, Lora, NoQuantization, Prefix, Prompt
from finetune.data.general import general_text
from finetune.data.render import Example
from finetune.data.stored import load_rows
from finetune.errors import ConfigError, VerificationError
from finetune.finished import RecordedBase, base_of_adapter
from finetune.hardware import detect
from finetune.merging.adapter import CONFIG, WEIGHTS
from finetune.merging.companions import TOKENIZER_FILES
from finetune.merging.inputs import Base, MergeSource
from finetune.model.builtin import fingerprint, resolve_model
from finetune.model.correction import FILE as CORRECTION
from finetune.model.load import DTYPES, load_tokenizer, storage_dtype
from finetune.model.tokens import token_ids
from finetune.model.weights import Weights
from finetune.planning.resolve import resolve
from finetune.runs import RunDirectory, open_run
from finetune.sealed import COPY_AGAIN, MANIFEST, read_json, sha256_of, verify

_ROWS = 256
"""Validation rows that a combination is verified on, in all."""
_BLOCK = 512
"""Tokens of a piece of general text, which serves where no entry is a run."""


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter of a plan."""

    name: str
    """The path as the plan gives it, absolute."""
    weight: float
    source: MergeSource
    new_tokens: tuple[str, ...]
    rows: Sequence[Example]
    """Validation rows of the run; none of an adapter without one."""
    sha256: str
    """Of the adapter's weights."""
    is_run: bool
    base_fingerprint: str | None = None
    """Of its base, as the run or the adapter's own record has it; None where nothing records it."""


@dataclass(frozen=True, slots=True)
class Members:
    """All adapters of a plan, which may be added to one another."""

    members: tuple[Member, ...]
    base_id: str
    """As a run's `model.id` names it."""
    revision: str | None
    """The commit of a hub model."""
    fingerprint: str
    """Of the base."""
    rows: tuple[Example, ...]
    """What the combination is measured on."""
    measured_on: str
    """What those rows are, in words."""
    notes: tuple[str, ...]
    """What the user should know."""

    @property
    def first(self) -> MergeSource:
        """The form of the base is that of every member."""
        return self.members[0].source

    @property
    def tokenizer_dir(self) -> Path:
        """The first adapter directory that has a tokenizer; else the base's."""
        own = (member.source.adapter_dir for member in self.members if _tokenizer_of(member.source.adapter_dir))
        return next(own, self.first.base_dir)


def find_members(plan: Plan) -> Members:
    """The adapters of ``plan``.

    ConfigError: a path that is no run and no adapter, an unfinished run, a method that changes no weight, another base, or updates that do
    not begin at one point. VerificationError: files that are not those of the run.
    """
    base: tuple[str, str | None] | None = (plan.base.id, plan.base.revision) if plan.base.id else None
    found = []
    for entry, weight in zip(plan.adapters, weights_of(plan), strict=True):
        path = Path(entry.path)
        run = _run_of(path)
        found.append((path, weight, run))
    runs = {run.path: load_config(run.config).config for _, _, run in found if run is not None}
    records = {path: _record_of(path) for path, _, run in found if run is None}
    stated = [(config.model.id, config.model.revision) for config in runs.values()]
    stated += [(record.id, record.revision) for record in records.values() if record is not None]
    if base is None and not stated:
        fix = "add `base: {id: ...}` to the plan"
        raise ConfigError("no entry of the plan is a run or records its base: the base is not known", where="base.id", fix=fix)
    base_id, revision = base or stated[0]
    directory = resolve_model(base_id, revision)
    print_of_base = fingerprint(directory)
    plain = MergeSource(directory, directory, NoQuantization(), torch.float32, base=plan.base.weights, device=_device())
    members = tuple(
        _from_run(run, runs[run.path], weight, plan.base.weights) if run is not None else _from_adapter(path, records[path], plain, weight)
        for path, weight, run in found
    )
    for member in members:
        if member.base_fingerprint not in (None, print_of_base):
            raise ConfigError(
                f"{member.name} was trained on another base than {base_id}",
                where=member.name,
                fix="combine adapters of one base; updates of different models have nothing in common",
            )
    members = tuple(replace(member, source=replace(member.source, base_dir=directory)) for member in members)
    _require_one_vocabulary(members)
    if plan.base.weights == "dequantized":
        _require_one_start(members)
    rows, measured_on = _rows(members, directory)
    return Members(members, base_id, revision, print_of_base, rows, measured_on, tuple(_notes(members, print_of_base)))


def _run_of(path: Path) -> RunDirectory | None:
    """The run at ``path``, or of which ``path`` is the adapter; None where it is an adapter by itself."""
    if (path / "environment.json").is_file():
        return open_run(path)
    if path.name == "adapter" and (path.parent / "environment.json").is_file():
        return open_run(path.parent)
    if not (path / CONFIG).is_file():
        raise ConfigError(
            "there is no such directory" if not path.exists() else f"neither a run nor an adapter ({CONFIG} is missing)",
            where=str(path),
            fix="name a finished run, or a directory that PEFT's save_pretrained wrote",
        )
    return None


def _from_run(run: RunDirectory, config: Config, weight: float, base: Base) -> Member:
    _require_update(run, config)
    directory = run.require_finished()
    records = read_json(run.environment)
    if sha256_of(run.rows) != records["rows_sha256"]:
        raise VerificationError("the run's validation rows are not those it was validated on", where=str(run.rows), fix="restore the file")
    dtype = storage_dtype(config.quantization, resolve(config, detect()).pinned(**records["computed_in"]))
    source = MergeSource(
        resolve_model(config.model.id, config.model.revision),
        directory,
        config.quantization,
        dtype,
        base=base,
        loftq=isinstance(config.tuning, Lora) and isinstance(config.tuning.init, LoftqInit),
        new_ids=token_ids(load_tokenizer(directory), config.model.new_tokens),
        device=_device(),
    )
    rows, _ = load_rows(run.rows)
    member = Member(str(run.path), weight, source, tuple(config.model.new_tokens), rows, sha256_of(directory / WEIGHTS), True)
    return replace(member, base_fingerprint=records["identity"]["fingerprints"]["base"])


def _record_of(path: Path) -> RecordedBase | None:
    """What the adapter at ``path`` says of its base, once it is known to be as it was written (pitfall A4)."""
    if (path / MANIFEST).is_file():
        verify(path, COPY_AGAIN)
    return base_of_adapter(path)


def _from_adapter(path: Path, record: RecordedBase | None, plain: MergeSource, weight: float) -> Member:
    """An adapter without a run: of the base in its record, or else of the unquantized one, which ``plain`` is."""
    if (path / CORRECTION).exists():
        raise ConfigError(
            f"a LoftQ adapter belongs to its run, which knows the quantization ({CORRECTION} lies here)",
            where=str(path),
            fix="name the run directory instead of a copy of its adapter",
        )
    if not (path / WEIGHTS).is_file():
        raise ConfigError(f"the adapter has no {WEIGHTS}", where=str(path), fix="adapters are read from safetensors alone")
    source, sha256 = replace(plain, adapter_dir=path), sha256_of(path / WEIGHTS)
    if record is None:
        return Member(str(path), weight, source, (), (), sha256, False)
    new_ids = token_ids(load_tokenizer(path), record.new_tokens) if record.new_tokens else ()
    source = replace(source, quantization=record.quantization, compute_dtype=DTYPES[record.dtype], new_ids=new_ids)
    return Member(str(path), weight, source, record.new_tokens, (), sha256, False, record.fingerprint)


def _require_update(run: RunDirectory, config: Config) -> None:
    """ConfigError for methods whose result is no adapter that changes weights."""
    match config.tuning:
        case Full():
            why, fix = "full tuning leaves a whole model and no adapter", "train with `tuning: {method: lora}`"
        case Prompt() | Prefix():
            why, fix = f"{config.tuning.method} tuning changes no weight", "combine adapters such as LoRA"
        case Houlsby():
            why, fix = "bottleneck layers are not linear, so that they are no update of a weight", "combine adapters such as LoRA"
        case _:
            return
    raise ConfigError(f"this run cannot be combined: {why}", where=str(run.path), fix=fix)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- what must agree -----------------------------------------------------------------------------------------------------------------


def _require_one_vocabulary(members: Sequence[Member]) -> None:
    first = members[0]
    for member in members:
        if (member.new_tokens, member.source.new_ids) != (first.new_tokens, first.source.new_ids):
            raise ConfigError(
                f"{member.name} has the new tokens {list(member.new_tokens)}, {first.name} {list(first.new_tokens)}",
                where="model.new_tokens",
                fix="combine runs with the same new tokens: the rows of others mean something else",
            )


def _require_one_start(members: Sequence[Member]) -> None:
    """ConfigError where the members began at different weights; see the module."""
    first = members[0]
    for member in members[1:]:
        if _start(member) != _start(first):
            raise ConfigError(
                f"{first.name} began at {_start_in_words(first)}, {member.name} at {_start_in_words(member)}",
                where="base.weights",
                fix="`base: {weights: original}` adds what each training did to the weights on disk",
            )


def _start(member: Member) -> tuple[object, ...]:
    """Equal for members whose training began at the same weights."""
    source = member.source
    quantization = source.quantization
    if isinstance(quantization, NoQuantization):
        return ("none", _rounded_to(source))
    double = quantization.double_quant if isinstance(quantization, FourBit) else None
    correction = sha256_of(source.adapter_dir / CORRECTION) if source.loftq else None
    return quantization.method, double, source.compute_dtype, correction


def _rounded_to(source: MergeSource) -> torch.dtype | None:
    """The type that loading rounded the weights to; None where it holds all of their values."""
    with Weights.of_model(source.base_dir) as weights:
        stored = {info.dtype for info in weights.info.values() if info.dtype.is_floating_point}
    exact = all(torch.promote_types(dtype, source.compute_dtype) == source.compute_dtype for dtype in stored)
    return None if exact else source.compute_dtype


def _start_in_words(member: Member) -> str:
    source = member.source
    dtype = str(source.compute_dtype).removeprefix("torch.")
    kind = f"weights in {dtype}" if isinstance(source.quantization, NoQuantization) else f"{source.quantization.method} weights in {dtype}"
    return f"{kind} with a start of LoftQ" if source.loftq else kind


def _tokenizer_of(directory: Path) -> tuple[str, ...]:
    return tuple(sha256_of(directory / name) for name in TOKENIZER_FILES if (directory / name).is_file())


def _notes(members: Sequence[Member], fingerprint_of_base: str) -> list[str]:
    found = []
    seen: dict[str, str] = {}
    for member in members:
        if member.sha256 in seen:
            found.append(f"{member.name} is the same adapter as {seen[member.sha256]}: it counts twice")
        seen.setdefault(member.sha256, member.name)
        if member.base_fingerprint is None:
            found.append(
                f"{member.name} is no run, and nothing records its base: it is taken for one of the unquantized base "
                f"{fingerprint_of_base[:12]}"
            )
    own = {member.name: kinds for member in members if (kinds := _tokenizer_of(member.source.adapter_dir))}
    if len(set(own.values())) > 1:
        found.append(f"tokenizers or chat templates differ: those of {next(iter(own))} are written")
    return found


# --- what the result is measured on --------------------------------------------------------------------------------------------------


def _rows(members: Sequence[Member], base_dir: Path) -> tuple[tuple[Example, ...], str]:
    """Rows of every run in equal number, or general text where no entry is a run."""
    runs = {member.name: member.rows for member in members if member.rows}
    if runs:
        share = max(1, _ROWS // len(runs))
        return tuple(row for rows in runs.values() for row in rows[:share]), f"validation rows of {len(runs)} run{'s' * (len(runs) > 1)}"
    ids = tuple(load_tokenizer(base_dir)(general_text(), add_special_tokens=False).input_ids)
    pieces = [ids[start : start + _BLOCK] for start in range(0, len(ids) - 1, _BLOCK)]
    return tuple(Example(piece, (False, *(True for _ in piece[1:])), "general text") for piece in pieces), "general text"
