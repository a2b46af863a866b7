"""Relative paths in a configuration start where they were written: beside the file, or in the working directory for an override."""

from __future__ import annotations

import os.path
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from finetune.config.tree import KeyPath, Node, replace_at


def absolute_paths(tree: Node) -> Node:
    """The tree with absolute data sources, task files and model directory; the place of each value stays."""
    for path in _path_values(tree):
        node = tree.find(path)
        if node and isinstance(node.content, str) and (directory := start_of(path, node.content, node.at.document.directory)):
            absolute = os.path.normpath(directory / os.path.expanduser(node.content))  # noqa: PTH111 - only ~, and only at the start
            tree = replace_at(tree, path, replace(node, content=absolute))
    return tree


def start_of(path: KeyPath, value: str, directory: Path) -> Path | None:
    """Where the path ``value`` starts, in a document of ``directory``; None for what is no path.

    What looks like a hub id and is a model in the working directory is that model for every library: it is recorded as such, since from
    another directory the same words would be the hub's.
    """
    if is_path(path, value):
        return directory
    is_model = path == ("model", "id") and value and os.path.isfile(os.path.join(value, "config.json"))  # noqa: PTH113, PTH118 - false for any text
    return Path.cwd() if is_model else None


def is_path(path: KeyPath, value: str) -> bool:
    """Whether the value at ``path`` names a place on disk. A model is a directory only if it says so with ./, ../, ~/ or /."""
    if path == ("model", "id"):
        return value.startswith(("./", "../", "/", "~/")) or value in (".", "..")
    if path[:2] == ("evaluation", "tasks") and path[-2] == "tasks":
        return value.endswith((".yaml", ".yml"))
    return bool(value) and not value.startswith(("builtin:", "hub:")) and "://" not in value and "$" not in value


def _path_values(tree: Node) -> Iterator[KeyPath]:
    yield ("model", "id")
    for part in ("train", "validation"):
        node = tree.find(("data", part))
        if node and isinstance(node.content, list):
            for index in range(len(node.content)):
                yield ("data", part, index, "source")
    yield from _measured(tree)


def _measured(tree: Node) -> Iterator[KeyPath]:
    """Rows of tasks, and task files of the harness."""
    tasks = tree.find(("evaluation", "tasks"))
    for index, task in enumerate(tasks.content if tasks and isinstance(tasks.content, list) else ()):
        yield ("evaluation", "tasks", index, "data", "source")
        names = task.child("tasks")
        for number in range(len(names.content) if names and isinstance(names.content, list) else 0):
            yield ("evaluation", "tasks", index, "tasks", number)
