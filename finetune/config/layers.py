"""The layers of a configuration - presets, the file, overrides - merged into one tree that remembers where each value came from."""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from pathlib import Path

from finetune.config import shape
from finetune.config.hints import nearest
from finetune.config.shape import Choice, Shape
from finetune.config.shipped import find_recipe, recipe_names, shipped_directory
from finetune.config.tree import Document, KeyPath, Node, Place, dotted, replace_at
from finetune.config.yaml12 import compose, read_text
from finetune.errors import ConfigError, Problem

EXTENDS = "extends"

_LINE_ENDS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_OVERRIDE_KEY = re.compile(r'(?:"([^"]+)"|([^."\s]+))(?:\.|$)')


def read_layers(path: Path, overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """The merged tree of the file, what it extends, and the overrides; and what is wrong with overrides that could not be merged."""
    tree = _read_document(path, shown(path), "file")
    presets = [_read_preset(entry, path.parent) for entry in _extended(tree)]
    tree = _without_extends(tree)
    for preset in reversed(presets):  # the file wins over its presets, a later preset over an earlier one
        tree = merge(preset, tree, shape.root())
    return _override(tree, overrides)


def shown(path: Path) -> str:
    """A path as errors show it: a shipped file by its short name, others relative to the working directory where they are inside it."""
    for kind in ("configs", "recipes"):
        if path.resolve().parent == shipped_directory(kind):
            return f"{kind}/{path.name}"
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow links, and the user did not
    working = Path.cwd()
    return str(absolute.relative_to(working)) if absolute.is_relative_to(working) else str(absolute)


def merge(base: Node, upper: Node, known: Shape | None) -> Node:
    """``upper`` over ``base``: mappings merge, everything else is replaced.

    A union that changes its member is replaced as a whole, so that no field of the other member leaks in.
    """
    if not isinstance(base.content, dict) or not isinstance(upper.content, dict) or _changes_member(base, upper, known):
        return upper
    merged = dict(base.content)
    keys = {**base.plain_keys(), **upper.plain_keys()}
    for key, node in upper.content.items():
        inner = shape.inner(known, key, keys)
        merged[key] = merge(merged[key], node, inner) if key in merged else node
    place = base if upper.at.document.kind == "override" else upper
    return Node(merged, place.at, place.key)


def _changes_member(base: Node, upper: Node, known: Shape | None) -> bool:
    if not isinstance(known, Choice):
        return False
    below, above = known.member(base.plain()), known.member(upper.plain())
    return below is not None and above is not None and below is not above


# --- files and presets ---------------------------------------------------------------------------------------------------------------


def _read_document(path: Path, name: str, kind: str) -> Node:
    text = read_text(path)
    document = Document(name, tuple(_LINE_ENDS.split(text)), "preset" if kind == "preset" else "file", path.parent.absolute())
    tree = compose(text, document)
    if tree.content is None:
        fix = "start from a recipe: `finetune init PATH --recipe domain-knowledge`"
        raise ConfigError("the file is empty", where=name, fix=fix)
    if not isinstance(tree.content, dict):
        raise ConfigError(
            "a configuration is a mapping of sections, and this is not",
            where=str(tree.at),
            fix="write `model: ...`, `tuning: ...`, `data: ...` at the left margin",
            excerpt=tree.at.excerpt(),
        )
    return tree


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


def _read_preset(entry: Node, directory: Path) -> Node:
    name = str(entry.content)
    path = _preset_path(entry, name, directory)
    tree = _read_document(path, shown(path), "preset")
    deeper = tree.child(EXTENDS)
    if deeper is not None:
        raise ConfigError(
            f"`extends` goes one level deep, and `{name}` extends something itself",
            where=f"{entry.at}, which reads {deeper.heading}",
            fix="list both presets where you extend: `extends: [first, second]`",
            excerpt=entry.at.excerpt(),
        )
    return tree


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


# --- overrides -----------------------------------------------------------------------------------------------------------------------


def _override(tree: Node, overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
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
    if path[0] == EXTENDS:
        raise _bad_override(text, "`extends` cannot be overridden", "change it in the file")
    node = compose(value, document, column=len(key) + 2)
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
        if kept is None or (kept.at.document is not node.at.document and not isinstance(node.content, dict)):
            problems.append(Problem(f"`{dotted(path)}` is undone by a later override", str(node.at), "remove one of the two"))
    return problems
