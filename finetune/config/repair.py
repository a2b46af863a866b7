"""A configuration with errors, mended just enough that the checks of combinations can run over the rest of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable

from pydantic import ValidationError

from finetune.config.schema import Config
from finetune.config.translate import complaints
from finetune.config.tree import KeyPath, Node, Plain

_STAND_INS: dict[KeyPath, Plain] = {
    ("model",): {"id": "owner/name"},
    ("model", "id"): "owner/name",
    ("tuning",): {"method": "lora"},
    ("data",): {"train": [{"source": "/train.jsonl"}]},
    ("data", "train"): [{"source": "/train.jsonl"}],
    ("output",): "runs/name",
}


def repaired(tree: Node, refused: Iterable[KeyPath]) -> Config | None:
    """The configuration without the refused values, required ones replaced; None if that is not enough."""
    plain = copy.deepcopy(tree.plain())
    paths = list(refused)
    for _ in range(3):
        for path in sorted(paths, key=len, reverse=True):
            _remove(plain, path)
        _fill(plain)
        try:
            return Config.model_validate_json(json.dumps(plain), strict=True)
        except ValidationError as error:
            found = complaints(error.errors(), _as_node(plain, tree))
            # Where a key is missing that has no stand-in, the section around it goes.
            paths = [complaint.path[:-1] if complaint.kind == "missing" else complaint.path for complaint in found]
    return None


def _remove(plain: Plain, path: KeyPath) -> None:
    holder = _holder(plain, path)
    if isinstance(holder, list):  # without one entry the others would change their numbers
        _remove(plain, path[:-1])
    elif isinstance(holder, dict):
        holder.pop(str(path[-1]), None)


def _fill(plain: Plain) -> None:
    for path, value in _STAND_INS.items():
        holder = _holder(plain, path)
        if isinstance(holder, dict):
            holder.setdefault(str(path[-1]), copy.deepcopy(value))


def _holder(plain: Plain, path: KeyPath) -> Plain:
    for key in path[:-1]:
        if isinstance(plain, dict):
            plain = plain.get(str(key))
        else:
            plain = plain[key] if isinstance(plain, list) and isinstance(key, int) and key < len(plain) else None
    return plain


def _as_node(plain: Plain, tree: Node) -> Node:
    if isinstance(plain, dict):
        return Node({key: _as_node(value, tree) for key, value in plain.items()}, tree.at)
    if isinstance(plain, list):
        return Node([_as_node(value, tree) for value in plain], tree.at)
    return Node(plain, tree.at)
