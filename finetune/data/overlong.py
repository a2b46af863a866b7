"""What becomes of a record that is longer than data.max_tokens.

A plain text is always cut into blocks. Each block after the first begins with the last token of the one before, as context without loss,
so that every token of the document but its first is supervised exactly once, and no block holds two documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from finetune.config.data import Data
from finetune.data.records import Conversation, Message, Record, Text
from finetune.data.render import Example, Renderer
from finetune.errors import DataError


class Piece(NamedTuple):
    """An example that fits, and the record that it shows (None for the later blocks of a text)."""

    example: Example
    record: Record | None


def shorten(record: Record, example: Example, data: Data, renderer: Renderer) -> list[Piece]:
    """The pieces of an ``example`` that is too long, none where it is dropped; DataError where data.overlong forbids it."""
    if isinstance(record, Text):
        blocks = _blocks(example, data.max_tokens)
        return [Piece(block, None if number else record) for number, block in enumerate(blocks)]
    match data.overlong:
        case "drop":
            return []
        case "truncate":
            return [Piece(_truncated(example, data.max_tokens), record)]
        case "split":
            return _Splitter(record, data, renderer).pieces()
        case "error":
            raise DataError(
                f"the row has {len(example.ids)} tokens, data.max_tokens is {data.max_tokens}",
                where=example.where,
                fix="raise data.max_tokens, or choose data.overlong: drop | truncate | split",
            )


def _blocks(example: Example, width: int) -> list[Example]:
    """Blocks of at most ``width`` tokens that overlap by one; the first token of each carries no loss, since nothing predicts it."""
    starts = range(0, max(1, len(example.ids) - 1), width - 1)
    blocks = [
        Example(example.ids[start : start + width], (False, *example.mask[start + 1 : start + width]), f"{example.where} block {number}")
        for number, start in enumerate(starts, start=1)
    ]
    return [block for block in blocks if any(block.mask)]


def _truncated(example: Example, width: int) -> Example:
    cut = Example(example.ids[:width], example.mask[:width], example.where)
    if not any(cut.mask):
        raise DataError(
            "truncation leaves no token that carries loss", where=example.where, fix="raise data.max_tokens, or choose data.overlong: drop"
        )
    return cut


class _Splitter:
    """Cuts one conversation into runs of exchanges; each is rendered again, so that the template sees a whole conversation."""

    def __init__(self, record: Conversation, data: Data, renderer: Renderer) -> None:
        self.record, self.data, self.renderer = record, data, renderer
        self.head, self.exchanges = exchanges(record.messages)
        self.alone = [self._alone(number) for number in range(len(self.exchanges))]

    def pieces(self) -> list[Piece]:
        """In order; those without a supervised message are left out. With `last-turn` one piece that ends with the last turn."""
        if self.data.supervise == "last-turn":
            return [self._last()]
        found: list[Piece] = []
        start = 0
        while start < len(self.exchanges):
            end = self._reach(start)
            if self._teaches(start, end):
                found.append(replace_where(self._piece(start, end), f"{self.record.where} piece {len(found) + 1}"))
            start = end
        return found

    def _reach(self, start: int) -> int:
        """End of the longest run from ``start`` that fits. Its exchanges' own lengths bound it from above; then it is tried."""
        end, bound = start + 1, self.alone[start]
        while end < len(self.exchanges) and (bound := bound + self.alone[end]) <= self.data.max_tokens:
            end += 1
        while end > start + 1 and self._length(start, end) > self.data.max_tokens:  # a template may add something between exchanges
            end -= 1
        while end < len(self.exchanges) and self._length(start, end + 1) <= self.data.max_tokens:
            end += 1
        return end

    def _last(self) -> Piece:
        end = len(self.exchanges)
        start = end - 1
        while start > 0 and self._length(start - 1, end) <= self.data.max_tokens:
            start -= 1
        return self._piece(start, end)

    def _alone(self, number: int) -> int:
        """Tokens of one exchange with the system message; DataError where it does not fit."""
        length = self._length(number, number + 1)
        if length > self.data.max_tokens:
            raise DataError(
                f"exchange {number + 1} alone has {length} tokens, data.max_tokens is {self.data.max_tokens}",
                where=self.record.where,
                fix="raise data.max_tokens, or choose data.overlong: drop | truncate",
            )
        return length

    def _teaches(self, start: int, end: int) -> bool:
        messages = [message for exchange in self.exchanges[start:end] for message in exchange]
        everyone = self.data.supervise == "all"
        return any(message.supervised and (everyone or message.role == "assistant") for message in messages)

    def _length(self, start: int, end: int) -> int:
        """Of the text alone: weights are no part of it, and would have pieces refused that teach nothing."""
        whole = self._record(start, end)
        messages = tuple([replace(message, supervised=True) for message in whole.messages])
        return len(self.renderer.example(replace(whole, messages=messages), "all").ids)

    def _piece(self, start: int, end: int) -> Piece:
        record = self._record(start, end)
        return Piece(self.renderer.example(record, self.data.supervise), record)

    def _record(self, start: int, end: int) -> Conversation:
        return replace(self.record, messages=(*self.head, *(message for exchange in self.exchanges[start:end] for message in exchange)))


def replace_where(piece: Piece, where: str) -> Piece:
    """``piece`` with another name for its place."""
    return Piece(replace(piece.example, where=where), piece.record)


def exchanges(messages: Sequence[Message]) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """The system messages at the start, and the rest cut before each user's message that follows a message of another role."""
    first = next((number for number, message in enumerate(messages) if message.role != "system"), len(messages))
    starts = [
        number
        for number in range(first, len(messages))
        if number == first or (messages[number].role == "user" and messages[number - 1].role != "user")
    ]
    return tuple(messages[:first]), [tuple(messages[left:right]) for left, right in zip(starts, [*starts[1:], len(messages)], strict=True)]
