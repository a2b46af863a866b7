"""Which tokens of a rendered record carry loss.

Control tokens cut a text for every tokenizer: no token reaches across one. So an answer that stands between two of them is found by
counting control tokens, in the text and in the ids, without the place of every token in the text. Where that does not decide (no
control token before an answer, a tokenizer that sees others than the text shows), the text is tokenized again with those places.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import NamedTuple

from finetune.data.content import control_pattern, written
from finetune.data.encoding import Encoded, Encoder
from finetune.data.records import Record, Text
from finetune.data.turns import Answer
from finetune.errors import DataError

_Spans = list[tuple[int, int]]


class Draft(NamedTuple):
    """A record as text, before it is tokenized. Numbers are characters of ``text``."""

    record: Record
    text: str
    prompt: str = ""
    """What stands before each answer to ask for it; empty where nothing does, or it is not known."""
    everything: bool = False
    """All but ``ignored`` carries loss; else ``learned``."""
    learned: tuple[Answer, ...] = ()
    ignored: Sequence[tuple[int, int]] = ()
    words: Sequence[tuple[int, int]] = ()
    """What the row says, to be free of control tokens."""


class Labels:
    """The rules of one tokenizer. ``structure``: ids and texts of the tokens that only the template may write."""

    def __init__(self, encoder: Encoder, structure: Mapping[int, str]) -> None:
        self._encoder = encoder
        self._structure = frozenset(structure)
        self._texts = frozenset(structure.values())
        self._pattern = control_pattern(structure.values())
        self._asked: dict[str, list[int]] = {}

    def mask(self, draft: Draft, ids: list[int]) -> list[bool]:
        """(t,) for the ids (t,) of a draft's text; DataError where an answer's tokens cannot be learned as they will be asked for."""
        spans = self._by_counting(draft, ids)
        if spans is None:
            encoded = self._encoder.places(draft.text)
            self._refuse_joined(draft, encoded)
            self._refuse_disguised(draft, encoded)
            spans = [self._by_places(draft, answer, encoded) for answer in draft.learned]
            ignored = [encoded.tokens(*span) for span in draft.ignored]
        else:
            ignored = []
        mask = [draft.everything] * len(ids)
        for value, ranges in ((False, ignored), (True, spans)):
            for first, last in ranges:
                mask[first:last] = [value] * (last - first)
        mask[:1] = [False]  # nothing predicts the first
        return mask

    def require_clean(self, draft: Draft, ids: list[int]) -> None:
        """DataError where the row's words are, complete or become a control token (C6), for texts whose mask is not asked for."""
        if isinstance(draft.record, Text):
            if self._structure.isdisjoint(ids):
                return
        else:
            marks = self._marks(draft.text)
            if sum(token in self._structure for token in ids) == len(marks) and not _overlap(marks, draft.words):
                return
        encoded = self._encoder.places(draft.text)
        self._refuse_joined(draft, encoded)
        self._refuse_disguised(draft, encoded)

    def _marks(self, text: str) -> _Spans:
        return [found.span() for found in self._pattern.finditer(text)] if self._pattern else []

    def _refuse_disguised(self, draft: Draft, encoded: Encoded) -> None:
        """A tokenizer that normalizes may read a control token where the text shows another (`＜|im_end|＞` in its full width)."""
        strings = (draft.record.text,) if isinstance(draft.record, Text) else tuple(written(draft.record.messages, draft.record.tools))
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            shape = draft.text[start:end].strip()
            if token in self._structure and shape not in self._texts and any(shape in string for string in strings):
                raise DataError(
                    f"the tokenizer reads {shape!r} as a control token", where=draft.record.where, fix="remove it from the text, or the row"
                )

    def _by_counting(self, draft: Draft, ids: list[int]) -> _Spans | None:
        """First and last + 1 of each answer's tokens; None where control tokens do not tell."""
        places = list(compress(range(len(ids)), map(self._structure.__contains__, ids)))  # twice as fast as a loop
        marks = self._marks(draft.text)
        if len(places) != len(marks) or draft.ignored or _overlap(marks, draft.words):
            return None
        ends = {end: place for (_, end), place in zip(marks, places, strict=True)}
        begins = {start: place for (start, _), place in zip(marks, places, strict=True)} if draft.prompt else ends
        asked, spans = self._asked_ids(draft.prompt), []
        for answer in draft.learned:
            before = begins.get(answer.start - len(draft.prompt)) if asked else ends.get(answer.start)
            last = ends.get(answer.end)
            if before is None or last is None:
                return None
            first = before + len(asked) if asked else before + 1
            if last < first or ids[before : before + len(asked)] != asked:
                return None
            spans.append((first, last + 1))
        return spans

    def _by_places(self, draft: Draft, answer: Answer, encoded: Encoded) -> tuple[int, int]:
        """The same by characters; DataError where the tokens do not begin after the prompt's (A5) or do not end the turn (A3)."""
        first, last = encoded.tokens(answer.start, answer.end)
        asked = self._asked_ids(draft.prompt)
        if (first and encoded.offsets[first - 1][1] > answer.start) or encoded.ids[max(first - len(asked), 0) : first] != asked:
            raise DataError(
                "the start of an assistant's text melts into one token with the prompt before it, which the model will never be asked with",
                where=f"{draft.record.where} message {answer.number + 1}",
                fix="remove the space or line break that the text begins with",
            )
        if last <= first or encoded.ids[last - 1] not in self._structure:
            raise DataError(
                "an assistant turn does not end with an end-of-turn token, so the model would never learn to stop",
                where=draft.record.where,
                fix="use a chat template that closes each turn with a special token",
            )
        return first, last

    def _asked_ids(self, prompt: str) -> list[int]:
        """The prompt's tokens, where a control token cuts them off from what stands before; else none."""
        if prompt not in self._asked:
            (ids,) = self._encoder.ids([prompt])
            self._asked[prompt] = ids if ids and ids[0] in self._structure else []
        return self._asked[prompt]

    def _refuse_joined(self, draft: Draft, encoded: Encoded) -> None:
        """The row's words hold no control token; nor may they complete one with what the template writes beside them (C6)."""
        for start, end in draft.words:
            if not self._is_clean(start, end, encoded) and not self._stands_elsewhere(draft.text, start, end, encoded):
                raise DataError(
                    "the text becomes part of a control token together with what the chat template writes beside it",
                    where=draft.record.where,
                    fix=f"remove {draft.text[max(start, end - 20) : end]!r}, or the row",
                )

    def _is_clean(self, start: int, end: int, encoded: Encoded) -> bool:
        first, last = encoded.tokens(start, end)
        first -= bool(first and encoded.offsets[first - 1][1] > start)
        return self._structure.isdisjoint(encoded.ids[first:last])

    def _stands_elsewhere(self, text: str, start: int, end: int, encoded: Encoded) -> bool:
        """Whether the words were found in the template's own markup (`im_end` in `<|im_end|>`) and stand outside it too."""
        words = text[start:end]
        while (start := text.find(words, start + 1)) >= 0:
            if self._is_clean(start, start + len(words), encoded):
                return True
        return False


def _overlap(marks: _Spans, words: Sequence[tuple[int, int]]) -> bool:
    for start, end in words:
        after = bisect_left(marks, (start,))
        if (after < len(marks) and marks[after][0] < end) or (after and marks[after - 1][1] > start):
            return True
    return False
