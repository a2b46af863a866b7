"""Where each value of a run came from, kept in its environment.json: config.yaml holds values alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config.dump import flat, leaves
from finetune.config.schema import Config
from finetune.config.tree import Document, Plain, dotted
from finetune.config.yaml12 import compose, read_text


def record_origins(config: Config, origins: Mapping[str, object] | None, before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted path -> value and origin, for environment.json; ``origins`` is None for a configuration that a program put together.

    ``before`` is what an earlier session recorded. A value that is as it was keeps its origin, for a run is usually resumed from its own
    config.yaml, which says nothing of where its values came from.
    """
    recorded = {}
    for path, value in leaves(config).items():
        key = dotted(path)
        if key in before and before[key]["value"] == value:
            recorded[key] = before[key]
        elif origins and key in origins:
            recorded[key] = {"value": value, "origin": str(origins[key])}
    return recorded


def stored_leaves(path: Path) -> dict[str, Plain]:
    """The values of a run's config.yaml by dotted path, as they were written: also by a version of the program that had other keys.

    ConfigError where it is no YAML.
    """
    text = read_text(path)
    node, _ = compose(text, Document(str(path), tuple(text.splitlines()), "file", path.parent))
    return {dotted(key): value for key, value in flat(node.plain()).items()}
