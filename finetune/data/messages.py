"""Turns of a conversation, as OpenAI and the hub write them (`messages`) and as ShareGPT does (`conversations`)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from finetune.data.records import ROLES, Message
from finetune.data.strict_json import JsonFault, decode
from finetune.errors import DataError

_ROLES = frozenset(ROLES)
_CHAT_KEYS = frozenset({"role", "content", "weight", "tool_calls", "tool_call_id", "name"})
_SHAREGPT_KEYS = frozenset({"from", "value", "weight"})
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# What other tools call the roles, where the spelling does not show it.
_MEANT = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


def chat_message(turn: Any, where: str, number: int) -> Message:
    """A turn with `role` and `content`; DataError."""
    if type(turn) is dict and len(turn) == 2:  # nearly all are a known role and a text, and nothing else
        role, content = turn.get("role"), turn.get("content")
        if type(role) is str and role in _ROLES and type(content) is str and content and not content.isspace() and "\0" not in content:
            return Message(role, content)
    return _whole_message(_object(turn, _CHAT_KEYS, f"{where} message {number}"), f"{where} message {number}")


def sharegpt_message(turn: Any, where: str, number: int) -> Message:
    """A turn with `from` and `value`; DataError."""
    place = f"{where} message {number}"
    values = _object(turn, _SHAREGPT_KEYS, place)
    speaker = values.get("from")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise DataError(f"unknown speaker {speaker!r}", where=place, fix=_suggestion(speaker, tuple(_SPEAKERS)))
    return _whole_message({"role": _SPEAKERS[speaker], "content": values.get("value"), "weight": values.get("weight")}, place)


def _object(turn: Any, keys: frozenset[str], where: str) -> dict[str, Any]:
    """The keys of ``turn`` that say something: tables hold null for what a turn lacks."""
    if not isinstance(turn, dict):
        raise DataError(f"a message must be an object, not {type(turn).__name__}", where=where, fix=f"write {_example(keys)}")
    values = {key: value for key, value in turn.items() if value is not None}
    if unknown := [key for key in values if key not in keys]:
        raise DataError(f"unknown key {unknown[0]!r} in a message", where=where, fix=_key_fix(unknown[0], keys))
    return values


def _key_fix(key: str, keys: frozenset[str]) -> str:
    if key in _SHAREGPT_KEYS | _CHAT_KEYS:
        return "messages with `role` and `content` are format `chat`, those with `from` and `value` format `sharegpt` (see `columns`)"
    if near := difflib.get_close_matches(key, sorted(keys), n=1):
        return f"write {near[0]!r}"
    return f"remove it; known keys are {', '.join(sorted(keys))}"


def _example(keys: frozenset[str]) -> str:
    return '{"role": "user", "content": "..."}' if keys is _CHAT_KEYS else '{"from": "human", "value": "..."}'


def _suggestion(name: object, known: tuple[str, ...]) -> str:
    if isinstance(name, str):
        lowered = name.strip().lower()
        meant = lowered if lowered in known else _MEANT.get(lowered)
        near = [meant] if meant in known else difflib.get_close_matches(lowered, known, n=1)
        if near:
            return f"did you mean {near[0]!r}? Known are {', '.join(known)}"
    return f"use one of {', '.join(known)}"


def _whole_message(values: Mapping[str, Any], where: str) -> Message:
    role = values.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        what = f"unknown role {role!r}" if role is not None else "a message without 'role'"
        raise DataError(what, where=where, fix=_suggestion(role, ROLES))
    calls = _tool_calls(values.get("tool_calls"), role, where)
    content = _content(values.get("content"), where, optional=bool(calls))
    if role == "assistant" and not calls and not content.strip():
        raise DataError("an assistant message is empty", where=where, fix="fill it in or remove the row")
    identity = _optional_text(values, "tool_call_id", where)
    if identity is not None and role != "tool":
        raise DataError(f"'tool_call_id' in a message of role {role!r}", where=where, fix="it belongs to messages of role 'tool'")
    return Message(role, content, calls, _optional_text(values, "name", where), identity, _supervised(values.get("weight"), where))


def _content(value: Any, where: str, *, optional: bool) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, list):
        value = "".join(_part(part, where) for part in value)
    if not isinstance(value, str):
        what = "null or missing" if value is None else type(value).__name__
        raise DataError(
            f"the content of a message must be text, not {what}", where=where, fix="write it as a string; only tool calls go without"
        )
    return checked_text(value, "content", where)


def _part(part: Any, where: str) -> str:
    values = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    kind, text = values.get("type"), values.get("text")
    if kind == "text" and isinstance(text, str) and len(values) == 2:
        return text
    named = f"of type {kind!r}" if isinstance(kind, str) and kind != "text" else "that is not {'type': 'text', 'text': '...'}"
    raise DataError(f"'content' has a part {named}", where=where, fix="this trains on text alone: keep text parts, or remove the row")


def checked_text(text: str, name: str, where: str) -> str:
    """``text``, unless it holds a NUL character."""
    if "\0" in text:
        raise DataError(f"{name!r} holds a NUL character", where=where, fix=r"remove it (\u0000), or the row")
    return text


def _optional_text(values: Mapping[str, Any], key: str, where: str) -> str | None:
    value = values.get(key)
    if value is None or (isinstance(value, str) and value):
        return value
    raise DataError(f"{key!r} must be text that is not empty", where=where, fix="write it as a string, or remove it")


def _supervised(weight: Any, where: str) -> bool:
    if weight is None:
        return True
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise DataError(f"'weight' is {weight!r}", where=where, fix="write 1 for a message that is learned, 0 for one that is not")
    return bool(weight)


def _tool_calls(calls: Any, role: str, where: str) -> tuple[Mapping[str, Any], ...]:
    if not calls and (calls is None or calls == []):
        return ()
    if role != "assistant":
        raise DataError(f"'tool_calls' in a message of role {role!r}", where=where, fix="only the assistant calls tools")
    if not isinstance(calls, list):
        raise DataError(f"'tool_calls' must be a list, not {type(calls).__name__}", where=where, fix=f"write [{_CALL}]")
    return tuple(_tool_call(call, f"{where} tool call {number}") for number, call in enumerate(calls, start=1))


_CALL = '{"type": "function", "function": {"name": "...", "arguments": {...}}}'


def _tool_call(call: Any, where: str) -> Mapping[str, Any]:
    outer = (
        _known(call, {"id", "type", "function", "index"}, where) if isinstance(call, dict) and "function" in call else {"function": call}
    )
    if outer.get("type", "function") != "function":
        raise DataError(f"a tool call of type {outer['type']!r}", where=where, fix="only functions can be called: `function`")
    inner = _known(outer["function"], {"name", "arguments"}, where)
    name = inner.get("name")
    if not isinstance(name, str) or not name:
        raise DataError("a tool call without the name of its function", where=where, fix=f"write {_CALL}")
    identity = {"id": outer["id"]} if "id" in outer else {}
    return {"type": "function", "function": {"name": name, "arguments": _arguments(inner.get("arguments", {}), where)}, **identity}


def _known(value: Any, keys: set[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"a tool call must be an object, not {type(value).__name__}", where=where, fix=f"write {_CALL}")
    values = {key: item for key, item in value.items() if item is not None}
    if unknown := [key for key in values if key not in keys]:
        raise DataError(f"unknown key {unknown[0]!r} in a tool call", where=where, fix=f"write {_CALL}")
    return values


def _arguments(value: Any, where: str) -> dict[str, Any]:
    """As an object: OpenAI writes them as a string, which chat templates would quote a second time."""
    if isinstance(value, str):
        value = _from_json(value, "'arguments'", where)
    if not isinstance(value, dict):
        raise DataError("'arguments' of a tool call must be an object", where=where, fix='write {"city": "Berlin"}')
    return value


def _from_json(text: str, name: str, where: str) -> Any:
    try:
        return decode(text.strip())
    except JsonFault as fault:
        raise DataError(f"{name}: {fault.what}", where=where, fix=fault.fix) from None


def tools_of(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """The row's `tools`: a list of function descriptions, or such a list as JSON in a string; DataError."""
    if value is None or value in ("", []):
        return ()
    if isinstance(value, str):
        value = _from_json(value, "'tools'", where)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError("'tools' must be a list of objects", where=where, fix=f"write [{_TOOL}]")
    for number, tool in enumerate(value, start=1):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tool {number} has no name: {json.dumps(tool, default=str)[:80]}", where=where, fix=f"write {_TOOL}")
    return tuple(value)


_TOOL = '{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'
