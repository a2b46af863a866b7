"""What a place of the configuration may hold, in words: for error messages and for the docs."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from finetune.config.shape import Block, Choice, Items, Leaf, Metadata, Shape, Table

_BOUND_WORDS = {"ge": "of at least {}", "gt": "above {}", "le": "up to {}", "lt": "below {}", "min_length": "that is not empty"}


def allowed(shape: Shape | None) -> str:
    """What a value of this shape may be, as the end of a sentence."""
    match shape:
        case Leaf():
            return _leaf_words(shape.annotation, shape.metadata)
        case Items():
            return f"a list, each entry {allowed(shape.item)}"
        case Table():
            return "a mapping of names to sections" if isinstance(shape.value, Block) else f"a mapping, each value {allowed(shape.value)}"
        case Block():
            return "a mapping with " + join(shape.entries, "and") if shape.entries else "an empty mapping"
        case Choice():
            if shape.key:
                return f"a mapping with `{shape.key}` one of {join(shape.members, 'or')}"
            return "; or ".join(allowed(member) for member in shape.members.values())
    return "nothing"


def words(shape: Shape | None) -> tuple[str, ...]:
    """The words that a leaf allows, if it is an enumeration."""
    if not isinstance(shape, Leaf):
        return ()
    return tuple(word for literal in _literals(shape.annotation) for word in get_args(literal) if isinstance(word, str))


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _literals(part)


def _leaf_words(annotation: Any, metadata: Metadata) -> str:
    if get_origin(annotation) is Annotated:
        inner_annotation, *more = get_args(annotation)
        return _leaf_words(inner_annotation, (*metadata, *more))
    if get_origin(annotation) is Literal:
        return join(get_args(annotation), "or")
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_leaf_words(part, metadata) for part in get_args(annotation)).replace("true or false or", "true, false or")
    if annotation in (bool, type(None)):
        return "true or false" if annotation is bool else "null"
    return {int: "a whole number", float: "a number", str: "text", Any: "any value"}.get(annotation, str(annotation)) + _bounds(metadata)


def _bounds(metadata: Metadata) -> str:
    flat = [item for group in metadata for item in (group.metadata if isinstance(group, FieldInfo) else (group,))]
    found = {name: value for item in flat for name in (*_BOUND_WORDS, "pattern") if (value := getattr(item, name, None)) is not None}
    if "pattern" in found:
        return f" that matches `{found['pattern']}`"
    if {"ge", "le"} <= found.keys():
        return f" from {_number(found['ge'])} to {_number(found['le'])}"
    limits = [word.format(_number(found[name])) for name, word in _BOUND_WORDS.items() if name in found]
    return " " + " and ".join(limits) if limits else ""


def _number(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def join(names: Iterable[object], last: str) -> str:
    """Names in a sentence: `a`, `b` or `c`."""
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {last} {quoted[-1]}"
