"""A model's config.json: found, read, and its fields checked one by one, since anybody may have edited it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config.schema import Model
from finetune.errors import ConfigError

CONFIG = "config.json"
_FIX = "copy the model's own config.json"


def read_config(directory: Path) -> dict[str, Any]:
    """The fields of the config.json in ``directory``; ConfigError where there is none, or it cannot be read."""
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        where = f"model.id: {directory}"
        raise ConfigError("the directory holds no config.json", where=where, fix="name a transformers model directory") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read config.json: {error}", where=str(path), fix=_FIX) from error
    if not isinstance(config, dict):
        raise ConfigError("config.json holds no object", where=str(path), fix=_FIX)
    return config


def size(config: Mapping[str, Any], key: str, where: str) -> int:
    """A field that must be there and count something."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        what = f"config.json lacks `{key}`" if value is None else f"`{key}` is {value!r}, not a positive integer"
        raise ConfigError(what, where=where, fix=_FIX)
    return value


def optional_size(config: Mapping[str, Any], key: str, default: int, where: str) -> int:
    """The same for a field that may be left out, or null."""
    return default if config.get(key) is None else size(config, key, where)


def flag(config: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    """A field that is true or false, or left out."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"`{key}` is {value!r}, not true or false", where=where, fix=_FIX)
    return value


def count_tokens(directory: Path) -> int | None:
    """Tokens of the tokenizer in ``directory``, added ones included; None where it is not stored as JSON."""
    try:
        stored = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = stored["model"]["vocab"]
        found = {entry if isinstance(entry, str) else entry[0] for entry in vocabulary}
        found |= {added["content"] for added in stored.get("added_tokens", ())}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return len(found)


def cached_copy(model: Model) -> Path | None:
    """The directory of ``model``, a hub id, in the hub's cache, where its config.json was downloaded before; None where it was not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.id, CONFIG, revision=model.revision)
    except HFValidationError as error:
        raise ConfigError(f"{model.id!r} is not a hub id", where="model.id", fix="a hub id reads owner/name") from error
    return Path(found).parent if isinstance(found, str) else None
