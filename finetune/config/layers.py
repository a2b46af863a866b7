"""The layers of a configuration - presets, the file, overrides - merged into one tree that remembers where each value came from."""

from __future__ import annotations

import functools
import os.path
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from finetune.config import shape
from finetune.config.hints import nearest
from finetune.config.merge import merge
from finetune.config.overrides import apply_overrides
from finetune.config.shipped import find_recipe, recipe_names, shipped_directory
from finetune.config.tree import Document, Node
from finetune.config.yaml12 import compose, read_text
from finetune.errors import ConfigError, Problem

EXTENDS = "extends"

_LINE_ENDS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


def read_layers(path: Path, overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """The merged tree of presets, the file and overrides, and the problems that did not prevent it; ConfigError for those that did."""
    tree, problems = _read_document(path, "file")
    layers = []
    for entry in _extended(tree):
        preset, found = _read_preset(entry, path.parent)
        layers.append(preset)
        problems.extend(found)
    merged = functools.reduce(lambda below, above: merge(below, above, shape.root()), [*layers, _without_extends(tree)])
    merged, found = apply_overrides(merged, overrides)
    return merged, [*problems, *found]


def shown(path: Path) -> str:
    """A path as errors show it: a shipped file by its short name, others relative to the working directory where they are inside it."""
    for kind in ("configs", "recipes"):
        if path.resolve().parent == shipped_directory(kind):
            return f"{kind}/{path.name}"
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow links, and the user did not
    working = Path.cwd()
    return str(absolute.relative_to(working)) if absolute.is_relative_to(working) else str(absolute)


# --- files and presets ---------------------------------------------------------------------------------------------------------------


def _read_document(path: Path, kind: Literal["file", "preset"]) -> tuple[Node, list[Problem]]:
    text = read_text(path)
    document = Document(shown(path), tuple(_LINE_ENDS.split(text)), kind, path.parent.absolute())
    tree, duplicates = compose(text, document)
    if tree.content is None:
        fix = "start from a recipe: `finetune init PATH --recipe domain-knowledge`"
        raise ConfigError("the file is empty", where=document.name, fix=fix)
    if not isinstance(tree.content, dict):
        raise ConfigError(
            "a configuration is a mapping of sections, and this is not",
            where=str(tree.at),
            fix="write `model: ...`, `tuning: ...`, `data: ...` at the left margin",
            excerpt=tree.at.excerpt(),
        )
    return tree, duplicates


def _extended(tree: Node) -> list[Node]:
    node = tree.child(EXTENDS)
    if node is None:
        return []
    entries = node.content if isinstance(node.content, list) else [node]
    wrong = [entry for entry in entries if not isinstance(entry.content, str) or not entry.content]
    if wrong or not entries:
        place = (wrong[0] if wrong else node).at
        fix = "write `extends: domain-knowledge`, or a list of names and paths"
        raise ConfigError("`extends` names a recipe or a YAML file", where=str(place), fix=fix, excerpt=place.excerpt())
    return entries


def _without_extends(tree: Node) -> Node:
    assert isinstance(tree.content, dict)
    return Node({key: node for key, node in tree.content.items() if key != EXTENDS}, tree.at, tree.key)


def _read_preset(entry: Node, directory: Path) -> tuple[Node, list[Problem]]:
    name = str(entry.content)
    path = _preset_path(entry, name, directory)
    tree, duplicates = _read_document(path, "preset")
    deeper = tree.child(EXTENDS)
    if deeper is not None:
        raise ConfigError(
            f"`extends` goes one level deep, and `{name}` extends something itself",
            where=f"{entry.at}, which reads {deeper.heading}",
            fix="list both presets where you extend: `extends: [first, second]`",
            excerpt=entry.at.excerpt(),
        )
    return tree, duplicates


def _preset_path(entry: Node, name: str, directory: Path) -> Path:
    bare = "/" not in name and not name.endswith((".yaml", ".yml"))
    path = find_recipe(name) if bare else directory / name
    if path is not None and path.is_file():
        return path
    known = recipe_names()
    close = nearest(Path(name).stem, known)
    fix = f"did you mean `extends: {close}`?" if close else f"shipped recipes: {', '.join(known)}"
    what = f"there is no recipe `{name}`" if bare else f"there is no file `{name}` to extend (seen from {shown(directory)})"
    raise ConfigError(what, where=str(entry.at), fix=fix, excerpt=entry.at.excerpt())
