"""From a conversation to token ids and the mask of tokens that carry loss.

Training, evaluation and generation share this one renderer, so that the model is asked exactly as it was taught (pitfall A5).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError

from finetune.data.formats import Conversation, Message, Record, Text
from finetune.errors import DataError

Supervise = Literal["assistant", "last-turn", "all"]

# What an expression of a template can raise beside Jinja's own errors: `{{ 1 + 'a' }}`, `{{ '%q' % 1 }}`, `{{ 1 / 0 }}`, ...
_TEMPLATE_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized example."""

    ids: tuple[int, ...]  # (t,)
    mask: tuple[bool, ...]  # (t,) True where the token is a target of the loss; the first never is, since nothing predicts it
    where: str

    @property
    def supervised(self) -> int:
        """Number of tokens that carry loss."""
        return sum(self.mask)

    def content_hash(self) -> str:
        """sha256 over ids and mask: equal for equal examples wherever they stand."""
        digest = hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in self.ids))
        digest.update(bytes(self.mask))
        return digest.hexdigest()


class Renderer:
    """The tokenizer with its own chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that encode to control tokens; content that contains one is refused (pitfall C6)."""
        return tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    @property
    def template_hash(self) -> str:
        """sha256 of the chat template; empty where the tokenizer has none."""
        template = self.tokenizer.chat_template
        return hashlib.sha256(str(template).encode()).hexdigest() if template else ""

    def prompt(self, messages: Sequence[Message], where: str = "prompt") -> tuple[int, ...]:
        """Ids that ask for the next assistant turn, as at inference."""
        self._check_content(messages, where)
        return self._encode(self._template(messages, where, ask=True))[0]

    def example(self, record: Record, supervise: Supervise = "assistant") -> Example:
        """Ids and loss mask of one record; DataError where no token carries loss."""
        example = self._document(record) if isinstance(record, Text) else self._conversation(record, supervise)
        if not example.supervised:
            raise DataError("no token of this row carries loss", where=record.where, fix="give it an answer, or remove it")
        return example

    def _document(self, record: Text) -> Example:
        self._check_content([Message("document", record.text)], record.where)
        ids = [*self.tokenizer(record.text)["input_ids"]]
        if self.tokenizer.eos_token_id is not None and ids[-1:] != [self.tokenizer.eos_token_id]:
            ids.append(self.tokenizer.eos_token_id)
        return Example(tuple(ids), (False, *(True for _ in ids[1:])), record.where)

    def _conversation(self, record: Conversation, supervise: Supervise) -> Example:
        self._check_content(record.messages, record.where)
        rendered = self._template(record.messages, record.where)
        ids, offsets = self._encode(rendered)
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            raise DataError("the chat template begins with two BOS tokens", where=record.where, fix="mend the tokenizer's chat template")
        if supervise == "all":
            return Example(ids, (False, *(True for _ in ids[1:])), record.where)
        mask = [False] * len(ids)
        for start, end in self._spans(record, rendered, last_only=supervise == "last-turn"):
            inside = [position for position, (left, right) in enumerate(offsets) if left >= start and right <= end and right > left]
            self._require_end_token(ids, inside, record.where)
            for position in inside:
                mask[position] = True
        return Example(ids, tuple(mask), record.where)

    def _spans(self, record: Conversation, rendered: str, *, last_only: bool) -> list[tuple[int, int]]:
        """Character ranges of the assistant's turns, from after the generation prompt to the end-of-turn token."""
        turns = [number for number, message in enumerate(record.messages) if message.role == "assistant"]
        spans = []
        for number in turns[-1:] if last_only else turns:
            before = self._template(record.messages[:number], record.where, ask=True)
            through = self._template(record.messages[: number + 1], record.where)
            if not (rendered.startswith(through) and through.startswith(before)):
                raise DataError(
                    "the chat template renders a turn differently once others follow, so its tokens cannot be told apart",
                    where=record.where,
                    fix="set data.supervise to `all`, or use a prefix-stable chat template",
                )
            spans.append((len(before), len(through.rstrip())))
        return spans

    def _require_end_token(self, ids: tuple[int, ...], inside: list[int], where: str) -> None:
        if not inside or ids[inside[-1]] not in self._control_ids:
            raise DataError(
                "an assistant turn does not end with an end-of-turn token, so the model would never learn to stop",
                where=where,
                fix="use a chat template that closes each turn with a special token",
            )

    def _template(self, messages: Sequence[Message], where: str, *, ask: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        if not self.tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template", where=where, fix="use an instruction-tuned model, or rows with a `text` column"
            )
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))
        except TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}", where=where, fix="check the order of roles") from error
        except _TEMPLATE_FAULTS as error:
            raise DataError(
                f"the chat template fails on this conversation: {type(error).__name__}: {error}",
                where=where,
                fix="check the order of roles, or mend the tokenizer's chat template",
            ) from error

    def _encode(self, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return tuple(encoded["input_ids"]), encoded["offset_mapping"]

    def _check_content(self, messages: Sequence[Message], where: str) -> None:
        for message in messages:
            if _SURROGATE.search(message.content):
                raise DataError(
                    "the text holds half a surrogate pair, which is no character",
                    where=where,
                    fix=r"remove it (\ud800 to \udfff), or the row",
                )
            for token in self.control_tokens:
                if token in message.content:
                    raise DataError(
                        f"the text contains the control token {token!r}", where=where, fix="remove it from the text, or the row"
                    )
