"""Tokenizing word by word, each word once, for tokenizers of which it is certain that they see no further than a word.

A single space between two characters that are not white space begins a token for every tokenizer that first cuts a text by one of the
expressions below: none of their alternatives takes a space after anything but white space, none looks back, and what an alternative
takes before the space it also takes before the end of the text. So the text may be cut there and its parts encoded apart; and since the
words of a language repeat, nearly all of them are known already. Texts where a space stands beside other white space are encoded whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, cast

from tokenizers import Tokenizer
from tokenizers.models import BPE

_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXPRESSIONS = frozenset(rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_REST}" for digits in (r"\p{N}{1,3}", r"\p{N}"))
"""Of Llama 3 and of Qwen 2; GPT-2's own is built into `ByteLevel`."""

_KNOWN = 32_768
"""Words that are kept: about 10 MiB."""
_LONGEST = 64
"""Characters of a word that is kept."""
_NEW_SHARE = 0.3
"""Where more than this share of the words is new, a call for each costs more than the text as a whole."""

Direct = Callable[[Sequence[str]], list[list[int]]]
_Known = dict[str, list[int] | None]  # None: it cannot be cut off


def sees_no_further(backend: Tokenizer, added: Iterable[str]) -> bool:
    """Whether ``backend`` encodes a text as its words; ``added``: texts of its added tokens."""
    model = backend.model
    if not isinstance(model, BPE) or model.dropout or any(" " in text for text in added):
        return False
    if _state(backend.normalizer) not in (None, {"type": "NFC"}):  # canonical composition never takes a space
        return False
    return _cuts_at_spaces(_state(backend.pre_tokenizer))


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _cuts_at_spaces(state: Any) -> bool:
    parts = state["pretokenizers"] if state and state["type"] == "Sequence" else [state] if state else []
    cuts = False
    for part in parts:
        match part:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": used}:
                cuts |= used
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False} if expression in _EXPRESSIONS:
                cuts = True
            case {"type": "Digits"}:
                pass
            case _:
                return False
    return cuts


class Words:
    """The words of one tokenizer that are known. ``direct`` encodes texts whole."""

    def __init__(self, direct: Direct) -> None:
        self._direct = direct
        self._first: _Known = {}
        self._later: _Known = {}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """As ``direct`` gives them, each (t,)."""
        if max(len(self._first), len(self._later)) > _KNOWN:
            self._first, self._later = {}, {}
        parted = [text.split(" ") for text in texts]
        first = {words[0] for words in parted} - self._first.keys()
        later = set(chain.from_iterable([words[1:] for words in parted])) - self._later.keys()
        if len(first) + len(later) > _NEW_SHARE * sum(map(len, parted)):
            return self._direct(texts)
        self._learn(self._first, first, "")
        self._learn(self._later, later, " ")
        found = [self._joined(words) for words in parted]
        whole = iter(self._direct([text for text, ids in zip(texts, found, strict=True) if ids is None]))
        return [next(whole) if ids is None else ids for ids in found]

    def _joined(self, words: list[str]) -> list[int] | None:
        parts = list(map(self._later.get, words))  # the first one's too: quicker than a slice, and not used
        parts[0] = self._first.get(words[0])
        return None if None in parts else list(chain.from_iterable(cast(list[list[int]], parts)))

    def _learn(self, known: _Known, words: set[str], before: str) -> None:
        short = [word for word in words if len(word) <= _LONGEST]
        apart = [word for word in short if word and not (word[0].isspace() or word[-1].isspace())]
        known.update(dict.fromkeys(short))
        known.update(zip(apart, self._direct([before + word for word in apart]), strict=True))
