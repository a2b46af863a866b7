"""The files beside the weights of a merged model: shard index, config.json, tokenizer, chat template, generation settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.errors import ConfigError, VerificationError
from finetune.model.shards import Slot
from finetune.model.weights import INDEX, SINGLE

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
"""Copied as one set, so that vocabulary, special tokens and chat template belong together."""

_GENERATION = "generation_config.json"
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DROPPED = ("torch_dtype", "quantization_config", "_name_or_path", "auto_map")


def read_model_config(directory: Path) -> dict[str, Any]:
    """config.json of the base; ConfigError where it is missing."""
    path = directory / "config.json"
    return _read_object(path)


def write_model_config(destination: Path, config: Mapping[str, Any], dtype: torch.dtype, *, untied: bool, rows: int | None = None) -> None:
    """The base's config.json with the type of the weights, whether the head was untied, and the vocabulary's ``rows`` where it grew."""
    written = {key: value for key, value in config.items() if key not in _DROPPED}
    if (untied or rows) and any(isinstance(value, dict) and "vocab_size" in value for value in written.values()):
        raise VerificationError(
            f"the adapter {'unties' if untied else 'enlarges'} embeddings in a model of nested configurations, which is not supported",
            where="config.json",
            fix="train with tuning.embeddings: frozen",
        )
    written["dtype"] = str(dtype).removeprefix("torch.")
    if untied:
        written["tie_word_embeddings"] = False
    if rows:
        written["vocab_size"] = rows
    (destination / "config.json").write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_index(destination: Path, shards: Mapping[str, Mapping[str, Slot]]) -> int:
    """The index of ``shards`` (none for a single file); returns the bytes of all tensors."""
    size = sum(slot.size for slots in shards.values() for slot in slots.values())
    if list(shards) != [SINGLE]:
        placement = {name: file for file, slots in shards.items() for name in slots}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placement.items()))}
        (destination / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return size


def copy_companions(base_dir: Path, adapter_dir: Path, destination: Path, end_ids: Sequence[int] = ()) -> None:
    """Copy tokenizer, chat template and generation settings from the adapter's directory where it has them, else from the base's.

    Generation stops at the tokens of the base and at ``end_ids``, those that training taught to end a turn with.
    """
    copy_tokenizer(base_dir, adapter_dir, destination)
    has_generation = (adapter_dir / _GENERATION).exists()
    _copy((adapter_dir if has_generation else base_dir) / _GENERATION, destination, may_link=not has_generation)
    _stop_at(destination, end_ids)


def copy_tokenizer(base_dir: Path, adapter_dir: Path, destination: Path) -> None:
    """Copy tokenizer and chat template from the adapter's directory where it has them, else from the base's."""
    own = any((adapter_dir / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    for name in TOKENIZER_FILES:
        _copy((adapter_dir if own else base_dir) / name, destination, may_link=not own)
    _copy_templates(adapter_dir if own else base_dir, destination)


def _stop_at(destination: Path, end_ids: Sequence[int]) -> None:
    """Add ``end_ids`` to the tokens at which generation stops (pitfall A3)."""
    path = destination / _GENERATION
    config = json.loads((destination / "config.json").read_text(encoding="utf-8"))
    # without a file, transformers takes these from config.json
    settings = _read_object(path) if path.is_file() else {key: config[key] for key in _SPECIAL_IDS if config.get(key) is not None}
    stated = settings.get("eos_token_id")
    ends = [] if stated is None else list(stated) if isinstance(stated, list) else [stated]
    missing = [end for end in end_ids if end not in ends]
    if missing:
        ends += missing
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path.name} of the base model: {error}", where=str(path), fix="check model.id") from error
    return found


def _copy_templates(source: Path, destination: Path) -> None:
    """Named chat templates, which transformers keeps in a folder of their own."""
    folder = source / "additional_chat_templates"
    if folder.is_dir() and not folder.is_symlink():
        (destination / folder.name).mkdir()
        for path in sorted(folder.glob("*.jinja")):
            _copy(path, destination / folder.name, may_link=True)


def _copy(path: Path, destination: Path, *, may_link: bool) -> None:
    """Copy a regular file if it exists. A base may come from the hub's cache, whose files are links; an adapter is a plain directory."""
    if path.is_symlink() and not may_link:
        raise VerificationError(f"{path.name} is a symbolic link", where=str(path.parent), fix="copy the adapter's files")
    if path.is_file():
        shutil.copyfile(path, destination / path.name)
