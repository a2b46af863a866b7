"""Examples as the model sees them: which tokens carry loss, and every character that a terminal would hide."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import ConfigError

if TYPE_CHECKING:
    from rich.text import Text

    from finetune.data.examples import Examples
    from finetune.data.render import Example

Order = Literal["first", "longest", "shortest", "random"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring tokens that all carry loss, or none of which does."""

    text: str
    supervised: bool


def choose(examples: Examples, count: int, order: Order, seed: int) -> list[int]:
    """Numbers (from 0) of ``count`` examples, or of all if there are fewer; ties keep the data's order."""
    numbers = range(len(examples))
    match order:
        case "first":
            return list(numbers[:count])
        case "random":
            return random.Random(seed).sample(numbers, min(count, len(numbers)))
        case "longest" | "shortest":
            sign = -1 if order == "longest" else 1
            lengths = examples.lengths.tolist()
            return sorted(numbers, key=lambda number: sign * lengths[number])[:count]


def require_numbers(numbers: Sequence[int], examples: Examples, side: str) -> None:
    """ConfigError for a number that no example has."""
    for number in numbers:
        if number >= len(examples):
            raise ConfigError(
                f"there is no {side} example {number}",
                where=f"--index {number}",
                fix=f"examples are counted from 0; the last is {len(examples) - 1}",
            )


def stretches(example: Example, tokenizer: Any) -> Iterator[Stretch]:
    """The example's text from its first token to its last, cut where the loss begins or ends."""
    start, before = 0, ""
    for position in range(1, len(example.ids) + 1):
        if position == len(example.ids) or example.mask[position] != example.mask[start]:
            # the text up to here less the text before: some tokenizers drop the space at the start of what they decode
            text = str(tokenizer.decode(example.ids[:position]))
            own = text[len(before) :] if text.startswith(before) else str(tokenizer.decode(example.ids[start:position]))
            yield Stretch(own, example.mask[start])
            start, before = position, text


def as_json(number: int, example: Example, parts: Sequence[Stretch], *, ids: bool) -> dict[str, Any]:
    """One example for programs; its text is exact."""
    found: dict[str, Any] = {
        "index": number,
        "where": example.where,
        "tokens": len(example.ids),
        "supervised": sum(example.mask),
        "stretches": [{"text": part.text, "supervised": part.supervised} for part in parts],
    }
    return found | ({"ids": list(example.ids), "mask": list(example.mask)} if ids else {})


def marked(parts: Sequence[Stretch], *, colour: bool) -> Text:
    """The text with what carries loss in green, or between [[ and ]] where there is no colour."""
    from rich.text import Text

    shown = Text()
    for part in parts:
        text = visible(part.text) if colour else _escaped(visible(part.text))
        shown.append(text if colour or not part.supervised else f"[[{text}]]", style="green" if part.supervised else "dim")
    return shown


_LIKE_MARKS = re.compile(r"\[{2,}|\]{2,}|^[\[\]]|[\[\]]\Z")
"""Brackets that could be taken for a mark, alone or together with the mark beside them."""


def has_marks(parts: Sequence[Stretch]) -> bool:
    """Whether the text itself holds [[ or ]]."""
    return any("[[" in part.text or "]]" in part.text for part in parts)


def _escaped(text: str) -> str:
    return _LIKE_MARKS.sub(lambda found: "".join(f"\\{bracket}" for bracket in found[0]), text)


def visible(text: str) -> str:
    """``text`` with each character that has no shape of its own written out; line ends stay.

    A terminal would obey control characters, and reverse or swallow what stands beside others.
    """
    return "".join(character if character == "\n" else _visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return "␡" if code == 0x7F else chr(0x2400 + code)
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character
