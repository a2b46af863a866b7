"""From a row's columns to a conversation or a plain text."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from finetune.data.messages import chat_message, checked_text, sharegpt_message, tools_of
from finetune.data.records import ROLES, Conversation, Message, Record, Row, Text
from finetune.data.shown import shown
from finetune.errors import DataError

__all__ = ["ROLES", "Conversation", "Message", "Record", "Text", "parse"]

_NONE: Mapping[str, str] = MappingProxyType({})


def parse(row: Row, format_name: str = "auto", columns: Mapping[str, str] = _NONE) -> Record:
    """The row as a conversation or text.

    ``columns`` maps a format's column names to the row's. Columns that the format does not know are passed over. DataError where the
    row fits no format, naming the nearest, or more than one.
    """
    if columns:
        row = _renamed(row, columns, format_name)
    name = _recognize(row) if format_name == "auto" else format_name
    chosen = _FORMATS[name]
    values = row.values
    for column in chosen.columns:
        if values.get(column) is None:
            raise _lacking(row, name, column)
    return chosen.parser(row)


def _renamed(row: Row, columns: Mapping[str, str], format_name: str) -> Row:
    known = _known_columns(format_name)
    for ours, theirs in columns.items():
        if ours not in known:
            near = difflib.get_close_matches(ours, sorted(known), n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(known))}"
            raise DataError(f"`columns` maps {ours!r}, which is no column of the format", where=row.where, fix=fix)
        if theirs not in row.values:
            near = difflib.get_close_matches(theirs, [*row.values], n=1)
            raise DataError(
                f"`columns` maps {ours!r} to {theirs!r}, which this row does not have: it has {_names(row)}",
                where=row.where,
                excerpt=_excerpt(row),
                fix=f"did you mean {near[0]!r}?" if near else "correct `columns`, or remove the row",
            )
    taken = set(columns.values())
    values = {name: value for name, value in row.values.items() if name not in taken}
    return Row(values | {ours: row.values[theirs] for ours, theirs in columns.items()}, row.where)


def _known_columns(format_name: str) -> set[str]:
    formats = _FORMATS.values() if format_name == "auto" else [_FORMATS[format_name]]
    return {column for one in formats for column in (*one.columns, *one.optional)}


def _recognize(row: Row) -> str:
    fitting = _fitting(tuple(row.values))
    if len(fitting) != 1:  # tables hold null where a row lacks a column
        fitting = _fitting(tuple(name for name, value in row.values.items() if value is not None)) or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(
            f"the row fits {len(fitting)} formats: {' and '.join(map(repr, fitting))}",
            where=row.where,
            excerpt=_excerpt(row),
            fix=f"state which, such as `format: {fitting[0]}`",
        )
    nearest = max(_FORMATS, key=lambda name: len(_similar(row, name)) / len(_FORMATS[name].columns))
    raise DataError(
        f"no known format has the columns {_names(row)}", where=row.where, excerpt=_excerpt(row), fix=_nearest_fix(row, nearest)
    )


@lru_cache(maxsize=512)
def _fitting(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Formats all of whose required columns are there."""
    return tuple(name for name, one in _FORMATS.items() if set(one.columns) <= set(columns))


@lru_cache(maxsize=512)
def _used(names: tuple[str, ...], format_name: str) -> frozenset[str]:
    chosen = _fitting(names) if format_name == "auto" else (format_name,)
    return frozenset(column for name in chosen for column in (*_FORMATS[name].columns, *_FORMATS[name].optional))


def unused_columns(names: tuple[str, ...], format_name: str = "auto", columns: Mapping[str, str] = _NONE) -> list[str]:
    """Those of a row's columns ``names`` that `parse` passes over; none where the row fits no format."""
    theirs = set(columns.values())
    kept = tuple(name for name in names if name not in theirs and name not in columns)
    used = _used((*kept, *columns), format_name)
    if not used:
        return []
    replaced = [name for name in names if name in columns and name not in theirs]
    return [*(name for name in kept if name not in used), *replaced, *(name for ours, name in columns.items() if ours not in used)]


def _similar(row: Row, name: str) -> dict[str, str]:
    """The format's columns that the row has, perhaps under a similar name."""
    lowered = {column.lower(): column for column in row.values}
    found = {}
    for wanted in _FORMATS[name].columns:
        if near := difflib.get_close_matches(wanted, [*lowered], n=1, cutoff=0.75):
            found[wanted] = lowered[near[0]]
    return found


def _nearest_fix(row: Row, nearest: str) -> str:
    wanted = " and ".join(repr(column) for column in _FORMATS[nearest].columns)
    similar = {ours: theirs for ours, theirs in _similar(row, nearest).items() if ours != theirs}
    mapping = ", ".join(f"{ours}: {shown(theirs)}" for ours, theirs in similar.items())
    rename = f" (`columns: {{{mapping}}}` gives the file's names)" if similar else ""
    return f"the nearest is {nearest!r}: it needs {wanted}{rename}"


def _lacking(row: Row, name: str, column: str) -> DataError:
    if column in row.values:
        return DataError(f"{column!r} is null", where=row.where, excerpt=_excerpt(row), fix="fill it in or remove the row")
    return DataError(
        f"format {name!r} needs the column {column!r}, this row has {_names(row)}",
        where=row.where,
        excerpt=_excerpt(row),
        fix="map it with `columns`, rename it, or state another `format`",
    )


def _names(row: Row) -> str:
    named = ", ".join(map(repr, [*row.values][:12])) or "none"
    return shown(named) + (", …" if len(row.values) > 12 else "")


def _excerpt(row: Row) -> str:
    """The start of the row as a terminal can show it."""
    try:
        return shown(json.dumps(row.values, ensure_ascii=False, default=str)[:120])
    except (RecursionError, ValueError, TypeError):  # nested almost as deeply as can be read, or a table's own types
        return ""


def _string(row: Row, column: str, *, empty: bool = False) -> str:
    value = row.values[column]
    if isinstance(value, list):
        raise DataError(
            f"{column!r} must be text, not a list", where=row.where, fix="messages in a list are format `chat`, in the column 'messages'"
        )
    if not isinstance(value, str):
        raise DataError(f"{column!r} must be text, not {type(value).__name__}", where=row.where, fix="write it as a string")
    if not empty and not value.strip():
        raise DataError(f"{column!r} is empty", where=row.where, fix="fill it in or remove the row")
    return checked_text(value, column, row.where)


def _optional(row: Row, column: str) -> str:
    return "" if row.values.get(column) is None else _string(row, column, empty=True)


def _turns(column: str, reader: Callable[[Any, str, int], Message]) -> Callable[[Row], Conversation]:
    def parser(row: Row) -> Conversation:
        turns, where = row.values[column], row.where
        if not isinstance(turns, list) or not turns:
            raise DataError(
                f"{column!r} must be a list with at least one message", where=where, fix='[{"role": "user", "content": "..."}, ...]'
            )
        messages = tuple([reader(turn, where, number) for number, turn in enumerate(turns, start=1)])
        _require_answer(messages, where)
        tools = tools_of(row.values["tools"], where) if "tools" in row.values else ()
        return Conversation(_with_system(row, messages), where, tools)

    return parser


def _require_answer(messages: tuple[Message, ...], where: str) -> None:
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise DataError("no message of role 'assistant': nothing to learn", where=where, fix="add the answer or remove the row")
    if not any(message.supervised for message in answers):
        raise DataError("every assistant message has weight 0: nothing to learn", where=where, fix="give one weight 1 or remove the row")


def _with_system(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """A `system` column of its own goes first; every conversational format may have one."""
    if "system" not in row.values or not (text := _optional(row, "system")).strip():
        return messages
    if any(message.role == "system" for message in messages):
        raise DataError("a column 'system' and a system message", where=row.where, fix="keep one of them")
    return (Message("system", text), *messages)


def _pair(question: str, answer: str) -> Callable[[Row], Conversation]:
    def parser(row: Row) -> Conversation:
        messages = (Message("user", _string(row, question)), Message("assistant", _string(row, answer)))
        return Conversation(_with_system(row, messages), row.where)

    return parser


def _alpaca(row: Row) -> Conversation:
    if row.values.get("history"):
        raise DataError("earlier turns in 'history' would be lost", where=row.where, fix="write the row as format `chat`")
    instruction, extra = _string(row, "instruction"), _optional(row, "input")
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return Conversation(_with_system(row, (Message("user", prompt), Message("assistant", _string(row, "output")))), row.where)


def _plain(row: Row) -> Text:
    return Text(_string(row, "text"), row.where)


@dataclass(frozen=True, slots=True)
class _Format:
    """The columns of a format and what they mean."""

    columns: tuple[str, ...]
    parser: Callable[[Row], Record]
    optional: tuple[str, ...] = ()


_FORMATS = {
    "chat": _Format(("messages",), _turns("messages", chat_message), ("tools", "system")),
    "sharegpt": _Format(("conversations",), _turns("conversations", sharegpt_message), ("tools", "system")),
    "prompt-completion": _Format(("prompt", "completion"), _pair("prompt", "completion"), ("system",)),
    "question-answer": _Format(("question", "answer"), _pair("question", "answer"), ("system",)),
    "alpaca": _Format(("instruction", "output"), _alpaca, ("input", "system", "history")),
    "text": _Format(("text",), _plain),
}
