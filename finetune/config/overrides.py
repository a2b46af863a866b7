"""`-o a.b=c`: one value over whatever the file and its presets say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from finetune.config import shape
from finetune.config.merge import merge
from finetune.config.tree import Document, KeyPath, Node, Place, dotted, replace_at
from finetune.config.yaml12 import compose
from finetune.errors import ConfigError, Problem

_OVERRIDE_KEY = re.compile(r'(?:"([^"]+)"|([^."\s]+))(?:\.|$)')


def apply_overrides(tree: Node, overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """The tree with each ``KEY=VALUE`` merged in, and what is wrong with those that could not be."""
    problems: list[Problem] = []
    applied: dict[KeyPath, Node] = {}
    for text in overrides:
        try:
            path, node = _parse_override(text)
            if path in applied:
                raise _bad_override(text, f"`{dotted(path)}` is overridden twice", "keep one of the two")
            _check_way(tree, path, text)
            tree = _merged_at(tree, path, node)
            applied[path] = node
        except ConfigError as error:
            problems.extend(error.problems)
    return tree, [*problems, *_without_effect(tree, applied)]


def _bad_override(text: str, what: str, fix: str) -> ConfigError:
    return ConfigError(what, where=f"-o {text}", fix=fix)


def _parse_override(text: str) -> tuple[KeyPath, Node]:
    key, equals, value = text.partition("=")
    example = "write `-o section.key=value`, such as `-o tuning.rank=32`"
    if not equals or not key:
        raise _bad_override(text, "an override needs a key and a value", example)
    if not value.strip():
        raise _bad_override(text, f"`{key}` has no value", f"write `-o {key}=null` for none")
    document = Document(text, (text,), "override", Path.cwd())
    path = _override_path(key)
    if path is None:
        raise _bad_override(text, f"`{key}` is not a path of keys", example)
    if path[0] == "extends":
        raise _bad_override(text, "`extends` cannot be overridden", "change it in the file")
    node, duplicates = compose(value, document, column=len(key) + 2)
    if duplicates:
        raise ConfigError.from_problems(duplicates)
    return path, Node(node.content, node.at, Place(document))


def _override_path(key: str) -> KeyPath | None:
    path: list[str | int] = []
    position = 0
    while position < len(key):
        match = _OVERRIDE_KEY.match(key, position)
        if match is None:
            return None
        quoted, plain = match.groups()
        path.append(quoted or (int(plain) if plain.isdecimal() else plain))
        position = match.end()
    return tuple(path) if path and not key.endswith(".") else None


def _check_way(tree: Node, path: KeyPath, text: str) -> None:
    """The way to an overridden value may create mappings, but neither list entries nor keys inside a single value."""
    here: Node | None = tree
    for depth, key in enumerate(path):
        above = f"`{dotted(path[:depth])}`"
        content = here.content if here else None
        if isinstance(content, list):
            if here is None or here.child(key) is None:
                entries = "1 entry, number 0" if len(content) == 1 else f"{len(content)} entries, numbers 0 to {len(content) - 1}"
                raise _bad_override(
                    text, f"{above} is a list with {entries}", f"override the whole list: `-o {dotted(path[:depth])}=[...]`"
                )
        elif isinstance(key, int):
            raise _bad_override(text, f"{above} is not a list that the file states", "state the list first, or override it whole: `[...]`")
        elif content is not None and not isinstance(content, dict):
            raise _bad_override(text, f"{above} is a single value, without keys inside", f"override {above} itself")
        here = here.child(key) if here else None


def _merged_at(tree: Node, path: KeyPath, node: Node) -> Node:
    # Lists are entered by number and never merged, so merging starts below the last one.
    start = max((depth + 1 for depth, key in enumerate(path) if isinstance(key, int)), default=0)
    here = tree.nearest(path[:start])
    return replace_at(tree, path[:start], merge(here, _upper(path[start:], node), shape.at(path[:start], tree.plain())))


def _upper(path: KeyPath, node: Node) -> Node:
    """Mappings that hold nothing but the value at ``path``: an override gets the same treatment as a file with one key."""
    for key in reversed(path):
        node = Node({str(key): node}, node.at, node.key)
    return node


def _without_effect(tree: Node, applied: dict[KeyPath, Node]) -> list[Problem]:
    """Overrides that a later one undid: nothing is silently ignored."""
    problems = []
    for path, node in applied.items():
        kept = tree.find(path)
        if kept is None and node.content is None:
            continue  # it removed a name of a table
        if kept is None or (kept.at.document is not node.at.document and not isinstance(node.content, dict)):
            problems.append(Problem(f"`{dotted(path)}` is undone by a later override", str(node.at), "remove one of the two"))
    return problems
