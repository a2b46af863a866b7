"""From a row's columns to a conversation or a plain text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.data.sources import Row
from finetune.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for the chat template; the assistant's carry loss."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Text:
    """A document without roles; every token carries loss."""

    text: str
    where: str


Record = Conversation | Text


def parse(row: Row, format_name: str = "auto") -> Record:
    """The row as a conversation or text; DataError where it fits no format, naming the nearest."""
    name = _recognize(row) if format_name == "auto" else format_name
    missing = [column for column in _COLUMNS[name] if column not in row.values]
    if missing:
        raise DataError(
            f"format {name!r} needs the column {missing[0]!r}, this row has {', '.join(map(repr, row.values)) or 'none'}",
            where=row.where,
            excerpt=_excerpt(row),
            fix="rename the column or state another `format`",
        )
    return _PARSERS[name](row)


def _recognize(row: Row) -> str:
    for name, columns in _COLUMNS.items():
        if all(column in row.values for column in columns):
            return name
    shared = {name: len(set(columns) & set(row.values)) for name, columns in _COLUMNS.items()}
    nearest = max(shared, key=lambda name: shared[name])
    wanted = " and ".join(repr(column) for column in _COLUMNS[nearest])
    raise DataError(
        f"no known format has the columns {', '.join(map(repr, row.values)) or '(none)'}",
        where=row.where,
        excerpt=_excerpt(row),
        fix=f"the nearest is {nearest!r}: it needs {wanted}",
    )


def _excerpt(row: Row) -> str:
    """The start of the row as a terminal can show it: half a surrogate pair, which JSON allows, has no encoding."""
    try:
        text = json.dumps(row.values, ensure_ascii=False, default=str)[:120]
    except RecursionError:  # nested almost as deeply as can be read
        return ""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _string(row: Row, column: str, *, empty: bool = False) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise DataError(f"{column!r} must be text, not {type(value).__name__}", where=row.where, fix="write it as a string")
    if not empty and not value.strip():
        raise DataError(f"{column!r} is empty", where=row.where, fix="fill it in or remove the row")
    return value


def _chat(row: Row) -> Conversation:
    turns = row.values["messages"]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            "'messages' must be a list with at least one message", where=row.where, fix='[{"role": "user", "content": "..."}, ...]'
        )
    messages = tuple(_message(turn, f"{row.where} message {number}") for number, turn in enumerate(turns, start=1))
    if not any(message.role == "assistant" for message in messages):
        raise DataError("no message of role 'assistant': nothing to learn", where=row.where, fix="add the answer or remove the row")
    return Conversation(messages, row.where)


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        keys = ", ".join(map(repr, turn)) if isinstance(turn, dict) else type(turn).__name__
        raise DataError(
            f"a message has exactly 'role' and 'content', this one has {keys}", where=where, fix="remove or rename the other keys"
        )
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise DataError(f"unknown role {role!r}", where=where, fix=f"use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"'content' must be text, not {type(content).__name__}", where=where, fix="write it as a string")
    if role == "assistant" and not content.strip():
        raise DataError("an assistant message is empty", where=where, fix="fill it in or remove the row")
    return Message(role, content)


def _pair(question: str, answer: str) -> Callable[[Row], Conversation]:
    def parser(row: Row) -> Conversation:
        return Conversation((Message("user", _string(row, question)), Message("assistant", _string(row, answer))), row.where)

    return parser


def _alpaca(row: Row) -> Conversation:
    instruction = _string(row, "instruction")
    extra = _string(row, "input", empty=True) if row.values.get("input") is not None else ""
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return Conversation((Message("user", prompt), Message("assistant", _string(row, "output"))), row.where)


def _plain(row: Row) -> Text:
    return Text(_string(row, "text"), row.where)


_COLUMNS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_PARSERS: dict[str, Callable[[Row], Record]] = {
    "chat": _chat,
    "prompt-completion": _pair("prompt", "completion"),
    "question-answer": _pair("question", "answer"),
    "alpaca": _alpaca,
    "text": _plain,
}
