"""The shape of the schema as plain data: sections, choices between sections, lists, tables and leaves.

Everything that must know the schema without validating against it - merging, error messages, origins, the docs, the property tests - reads
this one tree, which is built from the pydantic models.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin

from pydantic import Discriminator, Tag
from pydantic.fields import FieldInfo

from finetune.config.schema import Config, Section
from finetune.config.tree import KeyPath, Plain

Metadata: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Leaf:
    """A value that holds no sections: a number, a word, a switch."""

    annotation: Any
    metadata: Metadata = ()


@dataclass(frozen=True)
class Table:
    """A mapping with names that the user chooses."""

    value: Shape


@dataclass(frozen=True)
class Items:
    """A list."""

    item: Shape


@dataclass(frozen=True)
class Entry:
    """One key of a section."""

    shape: Shape
    info: FieldInfo

    @property
    def doc(self) -> str:
        """What the key means, in one paragraph."""
        return " ".join((self.info.description or "").split())

    @property
    def required(self) -> bool:
        return self.info.is_required()

    @property
    def default(self) -> Any:
        return self.info.get_default()


@dataclass(frozen=True)
class Block:
    """A section with fixed keys."""

    model: type[Section]
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class Choice:
    """One of several shapes, told apart by the word under ``key``, or, where there is no such key, by ``tell``."""

    key: str
    tell: Callable[[Any], str | None]
    members: Mapping[str, Shape]

    def member(self, value: Plain) -> Shape | None:
        """The shape that a value claims to have."""
        return self.members.get(self.tell(value) or "")

    def distinct(self) -> list[Shape]:
        """The members, each once even if several words choose it."""
        return list({id(member): member for member in self.members.values()}.values())


Shape: TypeAlias = Leaf | Table | Items | Block | Choice


@functools.cache
def root() -> Block:
    """The shape of a whole configuration."""
    return _block(Config)


@functools.cache
def of(annotation: Any) -> Shape:
    """The shape of another model than `Config`, or of a union of models."""
    return _shape(annotation)


def _block(model: type[Section]) -> Block:
    return Block(model, {name: Entry(_field(info), info) for name, info in model.model_fields.items()})


def _field(info: FieldInfo) -> Shape:
    metadata = tuple(info.metadata)
    if info.discriminator is not None:
        metadata = (*metadata, info)
    return _shape(info.annotation, metadata)


def _shape(annotation: Any, metadata: Metadata = ()) -> Shape:
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _shape(inner, (*metadata, *more))
    if get_origin(annotation) in (Union, types.UnionType):
        return _union(annotation, metadata)
    if get_origin(annotation) is tuple:
        return Items(_shape(get_args(annotation)[0]))
    if get_origin(annotation) is dict:
        return Table(_shape(get_args(annotation)[1]))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return _block(annotation)
    return Leaf(annotation, metadata)


def _union(annotation: Any, metadata: Metadata) -> Shape:
    members = [member for member in get_args(annotation) if member is not type(None)]
    marker = next((item for item in metadata if getattr(item, "discriminator", None) or isinstance(item, Discriminator)), None)
    discriminator = getattr(marker, "discriminator", None)
    if isinstance(discriminator, str):
        return _by_key(discriminator, members)
    if callable(discriminator):
        return Choice("", discriminator, {_tag(member): _shape(member) for member in members})
    inner = _shape(members[0])
    return inner if len(members) == 1 and not isinstance(inner, Leaf) else Leaf(annotation, metadata)


def _by_key(key: str, members: list[Any]) -> Choice:
    shapes: dict[str, Shape] = {}
    for member in members:
        shape = _shape(member)
        assert isinstance(shape, Block)
        shapes.update(dict.fromkeys(get_args(shape.model.model_fields[key].annotation), shape))
    return Choice(key, lambda value: value.get(key) if isinstance(value, dict) and isinstance(value.get(key), str) else None, shapes)


def _tag(member: Any) -> str:
    return next(item.tag for item in get_args(member) if isinstance(item, Tag))


# --- looking things up ---------------------------------------------------------------------------------------------------------------


def inner(shape: Shape | None, key: str | int, value: Plain = None) -> Shape | None:
    """The shape under ``key`` of a ``shape`` that holds ``value``; None where there is none."""
    if isinstance(shape, Choice):
        shape = shape.member(value)
    if isinstance(shape, Block) and key in shape.entries:
        return shape.entries[str(key)].shape
    if isinstance(shape, Table):
        return shape.value
    if isinstance(shape, Items) and isinstance(key, int):
        return shape.item
    return None


def at(path: KeyPath, value: Plain, top: Shape | None = None) -> Shape | None:
    """The shape at ``path`` of a configuration, or of another tree of the shape ``top``, that holds ``value``."""
    shape: Shape | None = top or root()
    for key in path:
        shape = inner(shape, key, value)
        value = _step(value, key)
    return shape


def _step(value: Plain, key: str | int) -> Plain:
    if isinstance(value, dict):
        return value.get(str(key))
    if isinstance(value, list) and isinstance(key, int) and key < len(value):
        return value[key]
    return None


def entries(shape: Shape, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Block, Entry]]:
    """Every key of every section, whichever choice it belongs to. List items appear as ``0`` and table keys as ``NAME``."""
    if isinstance(shape, Choice):
        for member in shape.distinct():
            yield from entries(member, path)
    elif isinstance(shape, Items):
        yield from entries(shape.item, (*path, 0))
    elif isinstance(shape, Table):
        yield from entries(shape.value, (*path, "NAME"))
    elif isinstance(shape, Block):
        for name, entry in shape.entries.items():
            yield (*path, name), shape, entry
            yield from entries(entry.shape, (*path, name))


def tags_of(choice: Choice, member: Block) -> tuple[str, ...]:
    """The words that choose a member, such as ``nf4`` and ``fp4``."""
    return tuple(tag for tag, shape in choice.members.items() if shape is member)
