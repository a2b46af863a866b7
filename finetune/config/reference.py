"""docs/config.md, written from the schema: one table a section, each key with what it may be, its default and its meaning."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

from finetune.config.allowed import allowed, words
from finetune.config.schema import Section
from finetune.config.shape import Block, Choice, Entry, Items, Leaf, Shape, Table, root, tags_of
from finetune.config.tree import KeyPath, dotted

_INTRODUCTION = """\
# Configuration

One YAML file describes a run. This page is generated from the schema by `docs/build.py`; `finetune config schema` prints the same for
editors, and `finetune config show CONFIG` prints every value of a file with its origin.

**Layers.** `extends: domain-knowledge` (a recipe, a file relative to this one, or a list of them) puts presets under the file; `-o a.b=c`
puts one value over it. Mappings merge, lists are replaced; where a section has kinds (`method: lora`, `method: full`), choosing another
kind replaces the section. A preset's group, pattern or column is removed with `null` (`-o optimizer.groups.mlp=null`).
Presets do not extend others. In an override, list entries are counted from 0 (`-o data.train.0.weight=2`), and
a key with a dot is quoted (`-o 'optimizer.groups."layers.0".lr_ratio=2'`).

**Values.** YAML 1.2: `1e-4` is a number; `yes`, `no` and `on` are words, a switch is `true` or `false`. Duplicate keys, tags and merge
keys are errors. Environment variables are not read. Relative data paths start at the file that names them. Tokens and passwords are
refused: log in with `hf auth login` or `wandb login`.

**Errors.** Unknown keys are errors. All problems are reported in one run, with file, line and column, before anything is downloaded.
"""


def config_reference() -> str:
    """The whole page."""
    top = root()
    parts = [_INTRODUCTION, "## Top level\n", _table(top)]
    for name, entry in top.entries.items():
        if not isinstance(entry.shape, Leaf):
            parts.extend(_section((name,), entry.shape, entry.doc))
    return "\n".join(parts)


def _section(path: KeyPath, shape: Shape, doc: str = "") -> Iterator[str]:
    """The headings and tables of a section and of those inside it."""
    if isinstance(shape, Items):
        yield from _section((*path, "N"), shape.item, doc)
    elif isinstance(shape, Table):
        yield from _section((*path, "NAME"), shape.value, doc)
    elif isinstance(shape, Choice):
        for member in shape.distinct():
            yield from _member(path, shape, member)
    elif isinstance(shape, Block):
        yield f"## `{dotted(path)}`\n\n{_about(shape.model)}\n"
        yield _table(shape)
        yield from _inside(path, shape)


def _member(path: KeyPath, choice: Choice, member: Shape) -> Iterator[str]:
    if not isinstance(member, Block):
        if isinstance(member, Items) and not isinstance(member.item, Leaf) and path != ("data", "validation"):
            yield from _section(path, member)
        return
    heading = f"`{dotted(path)}`"
    chosen_by = [f"`{choice.key}: {tag}`" for tag in tags_of(choice, member)] if choice.key else _constants(member)
    if chosen_by:
        heading += f" with {' or '.join(chosen_by)}"
    yield f"## {heading}\n\n{_about(member.model)}\n"
    yield _table(member)
    yield from _inside(path, member)


def _constants(block: Block) -> list[str]:
    """The keys of a section that can have one value only, and so tell it from others."""
    return [f"`{name}: {words(entry.shape)[0]}`" for name, entry in block.entries.items() if len(words(entry.shape)) == 1]


def _inside(path: KeyPath, block: Block) -> Iterator[str]:
    for name, entry in block.entries.items():
        if not isinstance(entry.shape, Leaf):
            yield from _section((*path, name), entry.shape)


def _about(model: type[Section]) -> str:
    return " ".join((inspect.getdoc(model) or "").split())


def _table(block: Block) -> str:
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    lines.extend(_row(name, entry) for name, entry in block.entries.items())
    return "\n".join(lines) + "\n"


def _row(name: str, entry: Entry) -> str:
    cells = (f"`{name}`", _kind(entry.shape), _default(entry), entry.doc or _doc_of(entry.shape))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _kind(shape: Shape) -> str:
    if isinstance(shape, Block):
        return "section"
    if isinstance(shape, Choice):
        if shape.key:
            return f"section by `{shape.key}`: " + ", ".join(f"`{tag}`" for tag in shape.members)
        return "; or ".join(_kind(member) for member in shape.members.values())
    if isinstance(shape, Items) and not isinstance(shape.item, Leaf):
        return "list of sections"
    return "named sections" if isinstance(shape, Table) and isinstance(shape.value, Block) else allowed(shape)


def _doc_of(shape: Shape) -> str:
    if isinstance(shape, Block):
        return _about(shape.model)
    return "Chooses these keys." if len(words(shape)) == 1 else ""


def _default(entry: Entry) -> str:
    if entry.required:
        return "**required**"
    return f"`{_flow(entry.default)}`"


def _flow(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump(mode="json", exclude_defaults=True, exclude_none=True) or {"method": getattr(value, "method", None)}
        value = {key: item for key, item in value.items() if item is not None}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return value if isinstance(value, str) else json.dumps(value)
