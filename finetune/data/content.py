"""What a conversation's words must and must not be: in the text that the template writes, and no control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from finetune.data.records import Conversation, Message
from finetune.data.turns import Chat
from finetune.errors import DataError


def control_pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """One expression for all control tokens, the longest first; None where there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def refuse_control_tokens(strings: Iterable[str], pattern: re.Pattern[str] | None, where: str) -> None:
    """DataError where a string contains the text of a control token (pitfall C6)."""
    found = pattern.search("\0".join(strings)) if pattern else None
    if found:
        raise DataError(f"the text contains the control token {found[0]!r}", where=where, fix="remove it from the text, or the row")


def refuse_half_characters(text: str, where: str) -> None:
    """DataError where ``text`` holds half a surrogate pair."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "the text holds half a surrogate pair, which is no character", where=where, fix=r"remove it (\ud800 to \udfff), or the row"
        ) from error


def written(messages: Iterable[Message], tools: Iterable[Mapping[str, Any]] = ()) -> Iterator[str]:
    """Every string that comes from the row."""
    for message in messages:
        yield message.content
        if message.name is not None:
            yield message.name
        if message.tool_call_id is not None:
            yield message.tool_call_id
        if message.tool_calls:
            yield from _strings(message.tool_calls)
    if tools:
        yield from _strings(tools)


def locate(record: Conversation, chat: Chat) -> list[tuple[int, int]]:
    """Characters of each message's words in the text, or nothing for one that is only found rewritten; DataError where words are lost."""
    text, places = chat.text, []
    starts = {answer.number: answer.start for answer in chat.answers}
    for number, message in enumerate(record.messages):
        left, right = chat.regions[number] if chat.regions else (0, len(text))
        left = starts.get(number, left)
        words = message.content.strip()
        place = text.find(words, left, right)
        if words and place >= 0:
            places.append((place, place + len(words)))
        elif words:
            _require_kept(words, text[left:right] if message.role == "assistant" else text, number, record)
        if message.tool_calls:
            _require_calls(message, text[left:right], number, record.where)
    for tool in record.tools:
        _require_tool(tool, text, record.where)
    return places


def locate_roughly(messages: Iterable[Message], text: str) -> list[tuple[int, int]]:
    """Characters of each message's words where they first stand in a prompt, whose template may leave out or rewrite some."""
    found = [(text.find(words), len(words)) for message in messages if (words := message.content.strip())]
    return [(start, start + length) for start, length in found if start >= 0]


def ignored(record: Conversation, chat: Chat) -> tuple[tuple[int, int], ...]:
    """Characters of the turns that the row gives no weight; DataError where some of them cannot be told from the others."""
    without = [number for number, message in enumerate(record.messages) if not message.supervised]
    if not without:
        return ()
    regions = chat.regions
    if regions is None:
        raise _not_left_out("the chat template does not tell where a turn begins", record.where)
    if record.messages[0].role == "system":  # its words may stand before the loop, which then passes over it
        regions = ((0, regions[0][1]), *regions[1:])
    for number, (message, (start, end)) in enumerate(zip(record.messages, regions, strict=True), start=1):
        words, text = message.content.strip(), chat.text[start:end]
        # Of every message: where the text of one is written into the turn of another, one of weight 0 would take its words along.
        if words and not _is_in(words, text) and "".join(words.split()) not in "".join(text.split()):
            raise _not_left_out(f"the chat template does not write message {number} ({message.role}) as a turn of its own", record.where)
    return tuple(regions[number] for number in without)


def _not_left_out(why: str, where: str) -> DataError:
    return DataError(
        f"{why}, so a turn of weight 0 cannot be left out", where=where, fix="set data.supervise to `assistant`, or remove the weight"
    )


def _require_kept(words: str, text: str, number: int, record: Conversation) -> None:
    """Templates may trim, indent, or write a tool's result as JSON; dropping or rewriting is no rendering of the row."""
    if not _is_in(words, text) and "".join(words.split()) not in "".join(text.split()):
        raise DataError(
            f"the chat template drops or alters the text of message {number + 1} ({record.messages[number].role})",
            where=record.where,
            fix="remove what the template does not write (such as <think> in earlier turns), or split the row after each answer",
        )


def _require_calls(message: Message, text: str, number: int, where: str) -> None:
    lost = next((value for value in _values([call.get("function", call) for call in message.tool_calls]) if not _is_in(value, text)), None)
    if lost is not None:
        raise DataError(
            f"the chat template does not write the tool call of message {number + 1}: {str(lost)[:60]!r} is missing",
            where=where,
            fix="use a model whose chat template knows tools, or write the call into the message's text",
        )


def _require_tool(tool: Mapping[str, Any], text: str, where: str) -> None:
    name = tool.get("function", tool).get("name", "")
    if not _is_in(name, text):
        raise DataError(
            f"the chat template does not write the tool {name!r}",
            where=where,
            fix="use a model whose chat template knows tools, or remove `tools`",
        )


def _is_in(value: str | float, text: str) -> bool:
    """As it is, or as JSON writes it; a number or truth value also as Python does."""
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    return value in text or json.dumps(value, ensure_ascii=False)[1:-1] in text or json.dumps(value)[1:-1] in text


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _values(value: object) -> Iterator[str | float]:
    """The texts, numbers and truth values of nested data without its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _values(item)
    elif isinstance(value, (bool, int, float)):
        yield value
