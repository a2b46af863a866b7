"""Values with the place they were written at: what the loader merges and the error messages point to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Scalar: TypeAlias = str | int | float | bool | None
Plain: TypeAlias = "Scalar | list[Plain] | dict[str, Plain]"
KeyPath: TypeAlias = "tuple[str | int, ...]"
"""Where a value sits in the configuration, such as ``("data", "train", 0, "weight")``."""

EXCERPT_COLUMNS = 68
"""An excerpt with its line number and indentation fits a terminal of 80 columns."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text that configuration came from: a file, a preset it extends, or an override."""

    name: str
    """What errors call it: a path as the user would type it, or the override itself."""
    lines: tuple[str, ...]
    kind: Literal["file", "preset", "override"]
    directory: Path
    """Where relative paths inside it start."""


@dataclass(frozen=True, slots=True)
class Place:
    """A line and a column of a document, both counted from 1."""

    document: Document
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        if self.document.kind == "override":
            return f"-o {self.document.name}"
        return f"{self.document.name}:{self.line}:{self.column}"

    def excerpt(self) -> str:
        """The line with a caret below the column, cut so that the caret is visible."""
        if self.document.kind == "override" or self.line > len(self.document.lines):
            return ""  # an override is shown whole as the place itself
        text = self.document.lines[self.line - 1].replace("\t", " ").rstrip()
        column = min(self.column, len(text) + 1)
        start = max(0, column - EXCERPT_COLUMNS + 12) if len(text) > EXCERPT_COLUMNS else 0
        shown = text[start : start + EXCERPT_COLUMNS]
        return f"{self.line} | {shown}\n{' ' * len(str(self.line))} | {' ' * (column - 1 - start)}^"


@dataclass(frozen=True, slots=True)
class Node:
    """A scalar, list or mapping, with the place of the value and of its key."""

    content: Scalar | list[Node] | dict[str, Node]
    at: Place
    key: Place | None = None

    @property
    def heading(self) -> Place:
        """The place that names the whole value: its key, where it has one."""
        return self.key or self.at

    def plain(self) -> Plain:
        """The value without places."""
        if isinstance(self.content, dict):
            return {key: node.plain() for key, node in self.content.items()}
        if isinstance(self.content, list):
            return [node.plain() for node in self.content]
        return self.content

    def plain_keys(self) -> dict[str, Plain]:
        """The scalars directly inside a mapping: enough to tell which member of a union it is."""
        if not isinstance(self.content, dict):
            return {}
        return {key: node.content for key, node in self.content.items() if not isinstance(node.content, (dict, list))}

    def child(self, key: str | int) -> Node | None:
        """The value under a key or index, if there is one."""
        if isinstance(self.content, dict):
            return self.content.get(str(key))
        if isinstance(self.content, list) and isinstance(key, int) and 0 <= key < len(self.content):
            return self.content[key]
        return None

    def find(self, path: KeyPath) -> Node | None:
        """The value at ``path``, if there is one."""
        node: Node | None = self
        for key in path:
            node = node.child(key) if node else None
        return node

    def nearest(self, path: KeyPath) -> Node:
        """The value at ``path``, or the innermost one that would hold it."""
        node = self
        for key in path:
            inner = node.child(key)
            if inner is None:
                break
            node = inner
        return node

    def walk(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
        """This value and every value inside it, with their paths."""
        yield path, self
        if isinstance(self.content, dict):
            for key, node in self.content.items():
                yield from node.walk((*path, key))
        elif isinstance(self.content, list):
            for index, node in enumerate(self.content):
                yield from node.walk((*path, index))


def dotted(path: KeyPath) -> str:
    """A path as the user writes it; a key that itself has a dot is quoted, as in ``optimizer.groups."layers.0".lr_ratio``."""
    return ".".join(f'"{key}"' if isinstance(key, str) and "." in key else str(key) for key in path)


def replace_at(node: Node, path: KeyPath, value: Node) -> Node:
    """The tree with ``value`` at ``path``, whose parent exists. Nothing is changed in place."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(node.content, list) and isinstance(key, int):
        items = list(node.content)
        items[key] = replace_at(items[key], rest, value)
        return Node(items, node.at, node.key)
    assert isinstance(node.content, dict)
    inner = node.content.get(str(key), Node({}, value.at, value.key))
    return Node({**node.content, str(key): replace_at(inner, rest, value)}, node.at, node.key)
