"""The tokenizer's own machine, called for a whole batch, with the place of every token in the text."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

from finetune.data.words import Words, sees_no_further
from finetune.errors import DataError

_STRANGE = ("\U00012000", "\ua66e", "\U0010fffd")  # characters that few vocabularies have
_PROBE = "A probe: two words,\n\n three  lines\tand 1234.5 — ünïcödé 漢字."


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as tokens."""

    ids: list[int]  # (t,)
    offsets: list[tuple[int, int]]  # (t,) characters of each token, never decreasing

    def tokens(self, start: int, end: int) -> tuple[int, int]:
        """First and last + 1 of the tokens that begin within characters ``start`` to ``end``."""
        return bisect_left(self.offsets, (start,)), bisect_left(self.offsets, (end,))


class Encoder:
    """A private copy of a fast tokenizer's backend: what others set on theirs (truncation, padding) does not reach it."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} does not tell where its tokens stand in the text",
                where="tokenizer",
                fix="use a model with a tokenizer.json (a fast tokenizer), or convert this one with transformers",
            )
        self._tokenizer = tokenizer
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._definition = hashlib.sha256(self._backend.to_str().encode("utf-8", "surrogatepass")).hexdigest()
        # Without its post-processor: that adds special tokens, which the template writes, and it trims spaces off the offsets.
        self._backend.post_processor = None
        self._backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        self._require_equal_ids()

    @cached_property
    def control(self) -> dict[int, str]:
        """Ids and texts of the special tokens."""
        return {number: token.content for number, token in self._tokenizer.added_tokens_decoder.items() if token.special}

    @cached_property
    def unknown(self) -> frozenset[int]:
        """Special tokens that the model writes for characters it does not know: they may stand in any text, whatever its structure."""
        named = self._backend.token_to_id(getattr(self._backend.model, "unk_token", None) or "")
        found = [named, *chain.from_iterable(self._direct(_STRANGE))]
        framing = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        return frozenset(token for token in found if token in self.control and token not in framing)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """One call of the tokenizer for all texts, without special tokens of its own.

        Where special tokens part a text into pieces that do not see each other, equal pieces are encoded once: what the template repeats
        in every row (a system message, the names of the roles) is a third of a short chat.
        """
        if self._borders is None:
            return self._direct(texts)
        parted = [self._borders.split(text) for text in texts]
        pieces = list(dict.fromkeys(chain.from_iterable([parts[::2] for parts in parted])))
        encode = self._words.ids if self._words else self._direct
        known = {text: [number] for number, text in self.control.items()} | dict(zip(pieces, encode(pieces), strict=True))
        return [list(chain.from_iterable([known[part] for part in parts])) for parts in parted]

    @cached_property
    def _words(self) -> Words | None:
        added = self._tokenizer.added_tokens_decoder.values()
        return Words(self._direct) if sees_no_further(self._backend, [token.content for token in added]) else None

    def _direct(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)] if texts else []

    @cached_property
    def _borders(self) -> re.Pattern[str] | None:
        """Finds the special tokens that part a text; None where the parts would not be encoded as in the whole."""
        added = self._tokenizer.added_tokens_decoder.values()
        special = [token for token in added if token.special]
        if not special or self._backend.encode_special_tokens or any(token.lstrip or token.rstrip or token.single_word for token in added):
            return None
        if self._backend.normalizer is not None and any(token.normalized for token in special):
            return None  # what is found in the normalized text cannot be looked for in this one
        if any(token.content in other.content for token in special for other in added if other is not token):
            return None  # which of the two is found would depend on more than the place
        borders = re.compile("(" + "|".join(re.escape(token.content) for token in special) + ")")
        probe = "".join(f"{token.content}{_PROBE}{token.content} {_PROBE} " for token in special)
        parts = self._direct(borders.split(probe))
        return borders if list(chain.from_iterable(parts)) == self._direct([probe])[0] else None

    def places(self, text: str) -> Encoded:
        """One text with the place of every token in it, which costs about a quarter more."""
        found = self._backend.encode(text, add_special_tokens=False)
        return Encoded(found.ids, found.offsets)

    def document(self, ids: list[int]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Ids and mask (t,) of a document: with the special tokens that the tokenizer adds, and its end marked."""
        before, after = self._frame
        end = self._tokenizer.eos_token_id
        if end is not None and (after or tuple(ids[-1:]))[-1:] != (end,):
            after = (*after, end)
        whole = (*before, *ids, *after)
        return whole, (False,) + (True,) * (len(whole) - 1)

    def fingerprint(self, template_hash: str) -> str:
        """sha256 over all that decides about ids."""
        names = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        definition = json.dumps([self._definition, names, template_hash, self._backend.encode_special_tokens], sort_keys=True)
        return hashlib.sha256(definition.encode()).hexdigest()

    @cached_property
    def _frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts before and after a text."""
        bare, framed = self._backend.encode("a", add_special_tokens=False).ids, list(self._tokenizer("a")["input_ids"])
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return tuple(framed[:start]), tuple(framed[start + len(bare) :])
        raise DataError("the tokenizer writes a text otherwise when it adds special tokens", where="tokenizer", fix="use another tokenizer")

    def _require_equal_ids(self) -> None:
        """The class around the backend may do work of its own; then the backend alone would give other ids."""
        expected = self._tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        if self._backend.encode(_PROBE, add_special_tokens=False).ids != list(expected):
            raise DataError(
                f"the tokenizer {type(self._tokenizer).__name__} changes texts outside its tokenizer.json",
                where="tokenizer",
                fix="use a tokenizer that is wholly defined by its tokenizer.json",
            )
