"""From a conversation to token ids and the mask of tokens that carry loss.

Training, evaluation and generation share this one renderer, so that the model is asked exactly as it was taught (pitfall A5).
"""

from __future__ import annotations

import hashlib
import re
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from finetune.data.content import (
    control_pattern,
    ignored,
    locate,
    locate_roughly,
    refuse_control_tokens,
    refuse_half_characters,
    written,
)
from finetune.data.encoding import Encoder
from finetune.data.labels import Draft, Labels
from finetune.data.records import Conversation, Message, Record, Text
from finetune.data.turns import Turns
from finetune.errors import DataError

Supervise = Literal["assistant", "last-turn", "all"]


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
        ids = array("I", self.ids)
        if sys.byteorder == "big":
            ids.byteswap()
        return hashlib.sha256(ids.tobytes() + bytes(self.mask)).hexdigest()


class Renderer:
    """The tokenizer with its own chat template. Can be pickled; not for several threads at once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __reduce__(self) -> tuple[type[Renderer], tuple[Any]]:
        return Renderer, (self.tokenizer,)  # what is compiled and probed is made again where it arrives

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that encode to control tokens; content that contains one is refused (pitfall C6)."""
        return tuple(self._encoder.control.values())

    @property
    def end_of_turn(self) -> int | None:
        """The token that closes an assistant's turn, at which generation must stop; None without a chat template."""
        return self._frame[1]

    @property
    def template_hash(self) -> str:
        """sha256 of the chat template; empty where the tokenizer has none."""
        template = self.tokenizer.chat_template
        return hashlib.sha256(str(template).encode()).hexdigest() if template else ""

    @cached_property
    def tokenizer_hash(self) -> str:
        """sha256 over all that decides about ids: vocabulary, merges, normalization, special tokens and the chat template."""
        return self._encoder.fingerprint(self.template_hash)

    def prompt(self, messages: Sequence[Message], where: str = "prompt", tools: Sequence[Mapping[str, Any]] = ()) -> tuple[int, ...]:
        """Ids that ask for the next assistant turn, as at inference."""
        refuse_control_tokens(written(messages, tools), self._forbidden, where)
        text = self._turns(bool(tools), where).text(messages, tools, ask=True, where=where)
        refuse_half_characters(text, where)
        ids = self._encoder.ids([text])[0]
        self._require_one_bos(ids, where)
        record = Conversation(tuple(messages), where, tuple(tools))
        self._labels.require_clean(Draft(record, text, words=locate_roughly(messages, text)), ids)
        return tuple(ids)

    def example(self, record: Record, supervise: Supervise = "assistant") -> Example:
        """Ids and loss mask of one record; DataError where no token carries loss."""
        (example,) = self.examples((record,), supervise)
        if isinstance(example, DataError):
            raise example
        return example

    def examples(self, records: Sequence[Record], supervise: Supervise = "assistant") -> list[Example | DataError]:
        """`example` of each record, in order, with one call of the tokenizer; a record that cannot be used gives its error instead.

        DataError where the chat template does not compile: no conversation can be used then.
        """
        if self.tokenizer.chat_template:
            for with_tools in {bool(record.tools) for record in records if isinstance(record, Conversation)}:
                self._turns(with_tools)
        drafts = [self._try_draft(record, supervise) for record in records]
        encoded = iter(self._encoder.ids([draft.text for draft in drafts if isinstance(draft, Draft)]))
        return [draft if isinstance(draft, DataError) else self._try_finish(draft, next(encoded)) for draft in drafts]

    def _try_draft(self, record: Record, supervise: Supervise) -> Draft | DataError:
        try:
            draft = self._document(record) if isinstance(record, Text) else self._conversation(record, supervise)
            refuse_half_characters(draft.text, record.where)
        except DataError as error:
            return error
        return draft

    def _try_finish(self, draft: Draft, ids: list[int]) -> Example | DataError:
        try:
            return self._finish(draft, ids)
        except DataError as error:
            return error

    def _document(self, record: Text) -> Draft:
        refuse_control_tokens((record.text,), self._forbidden, record.where)
        return Draft(record, record.text)

    def _conversation(self, record: Conversation, supervise: Supervise) -> Draft:
        refuse_control_tokens(written(record.messages, record.tools), self._forbidden, record.where)
        turns = self._turns(bool(record.tools), record.where)
        if supervise == "all":
            chat = turns.whole(record)
            return Draft(record, chat.text, everything=True, ignored=ignored(record, chat), words=locate(record, chat))
        chat = turns.chat(record)
        learned = chat.answers[-1:] if supervise == "last-turn" else chat.answers
        learned = tuple([answer for answer in learned if record.messages[answer.number].supervised])
        return Draft(record, chat.text, chat.prompt, learned=learned, words=locate(record, chat))

    def _finish(self, draft: Draft, ids: list[int]) -> Example:
        where = draft.record.where
        if isinstance(draft.record, Text):
            self._labels.require_clean(draft, ids)
            example = Example(*self._encoder.document(ids), where)
        else:
            self._require_one_bos(ids, where)
            example = Example(tuple(ids), tuple(self._labels.mask(draft, ids)), where)
        if True not in example.mask:
            raise DataError("no token of this row carries loss", where=where, fix="give it an answer, or remove it")
        return example

    def _require_one_bos(self, ids: Sequence[int], where: str) -> None:
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            raise DataError("the chat template begins with two BOS tokens", where=where, fix="mend the tokenizer's chat template")

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def _compiled(self) -> dict[str, Turns]:
        return {}

    def _turns(self, with_tools: bool = False, where: str = "tokenizer") -> Turns:
        """The compiled template; some tokenizers have a second one for conversations with tools."""
        if not self.tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template", where=where, fix="use an instruction-tuned model, or rows with a `text` column"
            )
        source = str(self.tokenizer.get_chat_template(tools=[{}] if with_tools else None))
        if source not in self._compiled:
            self._compiled[source] = Turns(source, self.tokenizer.special_tokens_map)
        return self._compiled[source]

    @cached_property
    def _labels(self) -> Labels:
        unknown = self._encoder.unknown
        return Labels(self._encoder, {token: text for token, text in self._structure.items() if token not in unknown})

    @cached_property
    def _structure(self) -> dict[int, str]:
        """Special tokens, and added ones that are not marked special but frame this template's turns."""
        return self._encoder.control | self._frame[0]

    @cached_property
    def _frame(self) -> tuple[dict[int, str], int | None]:
        """Added tokens around a user's turn and at the end of an assistant's, as a short conversation shows them; and that last one."""
        turns = (Message("user", "First question."), Message("assistant", "First answer."))
        try:
            texts = [self._turns().text(turns[:1]), self._turns().text(turns).rstrip()]
        except DataError:  # no template, or one that takes no such conversation
            return {}, None
        question, answer = self._encoder.ids(texts)
        known = self.tokenizer.added_tokens_decoder.items()
        added = {number: token.content for number, token in known if number not in self._encoder.unknown}
        closing = answer[-1] if answer and answer[-1] in added else None
        return {number: added[number] for number in (*question, *answer[-1:]) if number in added}, closing

    @cached_property
    def _forbidden(self) -> re.Pattern[str] | None:
        return control_pattern(self._structure.values())
