"""Where the shape of a model comes from: its directory, the table of known models, or the hub's cache."""

from __future__ import annotations

from pathlib import Path

from finetune.config.schema import Model
from finetune.errors import ConfigError
from finetune.planning import families
from finetune.planning.config_json import CONFIG, cached_copy, count_tokens, read_config
from finetune.planning.shapes import BUILTIN, ModelShape, read_shape


def find_shape(model: Model) -> ModelShape:
    """The shape of ``model``: from its directory, from the table of known models, or from the hub's cache. The network is not asked.

    ConfigError where none of them has it, or the architecture is not known.
    """
    if model.id == BUILTIN:
        return _shipped(families.SMOLLM2_135M)
    directory = Path(model.id).expanduser()
    if directory.is_dir():
        return _of_directory(directory, model)
    if families.find(model.id) is not None:
        return _shipped(model.id)
    if model.id.startswith((".", "/", "~", "builtin:")) or model.id.count("/") > 1:
        raise ConfigError(f"{model.id!r} is neither a directory nor a hub id", where="model.id", fix="a hub id reads owner/name")
    cached = cached_copy(model)
    if cached is None:
        pinned = f" --revision {model.revision}" if model.revision else ""
        raise ConfigError(
            "the shapes of this model are not known: there is no such directory, and no copy in the hub's cache",
            where=f"model.id: {model.id}",
            fix=f"with network: hf download {model.id} config.json{pinned}",
        )
    return _of_directory(cached, model)


def _shipped(model_id: str) -> ModelShape:
    known = families.find(model_id)
    assert known is not None
    return read_shape(known.config, f"the table of known models: {known.ids[0]}", known.tokens)


def _of_directory(directory: Path, model: Model) -> ModelShape:
    # the whole tokenizer has to be read for its length, and only new tokens ask for it
    tokens = count_tokens(directory) if model.new_tokens else None
    return read_shape(read_config(directory), str(directory / CONFIG), tokens)
