"""JSON as RFC 8259 has it, without what Python's reader lets pass: duplicate keys, NaN, infinite numbers, bottomless nesting."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

MAX_DEPTH = 100
"""Levels of lists and objects in one row. Deeper rows exhaust the stack of whatever copies or prints them later."""


class JsonFault(Exception):  # noqa: N818 - becomes an error only once its place is known
    """Why a text is not the JSON that is wanted, and how to mend it; without a place in a file."""

    def __init__(self, what: str, fix: str, position: int | None = None) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix
        self.position = position
        """Index of the character at which the syntax breaks; None where the syntax is sound."""


def decode(text: str) -> Any:
    """The one JSON value of ``text``, which has no white space around it; JsonFault where it is none."""
    value, end = decode_at(text, 0)
    if end != len(text):
        raise JsonFault("not valid JSON: text follows the value", "one complete JSON value, and nothing after it", end)
    return value


def decode_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at ``start``, and the index after it; JsonFault."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise JsonFault(f"not valid JSON: {error.msg.removesuffix(' at')}", "write complete JSON", error.pos) from None
    except RecursionError:
        raise JsonFault(*_TOO_DEEP) from None
    except ValueError as error:  # a number with thousands of digits
        raise JsonFault(f"not readable JSON: {error}", "write it as a string") from None
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _too_deep(value):
        raise JsonFault(*_TOO_DEEP)
    return value, end


def skip(text: str, start: int) -> int | None:
    """Index after the value at ``start`` that ``decode_at`` refused; None where its end cannot be told."""
    try:
        return _LENIENT.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


_TOO_DEEP = (f"the JSON is nested too deeply to be read (more than {MAX_DEPTH} levels)", "flatten the row, or remove it")


def _too_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return False
    return True


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise JsonFault(f"the key {key!r} stands more than once in one object", "keep one of them, or rename it")
    return values


def _constant(name: str) -> None:
    raise JsonFault(f"{name} is not JSON", "write null, a number or a string")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise JsonFault(f"the number {digits[:40]} is larger than any that can be read", "write it as a string")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
_LENIENT = json.JSONDecoder(parse_int=str, parse_float=str)
