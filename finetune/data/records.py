"""A row, and what it becomes: a conversation for the chat template, or a plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file and its place, such as ``chat.jsonl:17``."""

    values: dict[str, Any]
    where: str

    def __reduce__(self) -> tuple[type[Row], tuple[dict[str, Any], str]]:
        """Rows go to other processes by the million: this takes half the time of what a dataclass with slots does."""
        return Row, (self.values, self.where)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """What an assistant calls: `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with `id` where the row has it."""
    name: str | None = None
    tool_call_id: str | None = None
    supervised: bool = True
    """False where the row says `weight: 0`: the turn is context, and never carries loss."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for the chat template; the assistant's carry loss."""

    messages: tuple[Message, ...]
    where: str
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the assistant may call, as JSON schemas."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document without roles; every token carries loss."""

    text: str
    where: str


Record = Conversation | Text
