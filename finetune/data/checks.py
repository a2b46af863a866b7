"""What is often wrong with single examples: seen in every one of them, counted, and shown with the first places."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import IntFlag

import numpy as np
import numpy.typing as npt
from ftfy.badness import is_bad

from finetune.data.examples import Flat
from finetune.data.records import Record, Text
from finetune.data.report import Finding

Flags = npt.NDArray[np.uint8]  # (n,) of `Flag`

MOSTLY_UNSUPERVISED_SHARE = 0.05
PLACES = 3


class Flag(IntFlag):
    """One bit for each finding."""

    TINY = 1
    REPLACEMENT = 2
    CONTROL = 4
    MOJIBAKE = 8
    UNSUPERVISED = 16


_NAMES: dict[Flag, tuple[str, str]] = {
    Flag.TINY: ("tiny answers", "fewer than two tokens carry loss beside the end of the turn: check the column of answers"),
    Flag.REPLACEMENT: ("replacement characters", "U+FFFD stands where a character was lost: decode the source with its true encoding"),
    Flag.CONTROL: ("control characters", "characters that no text needs (C0 or C1 controls): remove them"),
    Flag.MOJIBAKE: ("damaged encoding", "text such as `schÃ¶n` was decoded with the wrong encoding: mend it, for example with ftfy"),
    Flag.UNSUPERVISED: (
        "mostly unsupervised",
        f"under {MOSTLY_UNSUPERVISED_SHARE:.0%} of the tokens carry loss: most of the time goes into prompts that teach nothing",
    ),
}

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_ASCII_CONTROLS = bytes(number for number in range(128) if _CONTROL.match(chr(number)))
# UTF-8 read as Windows-1252 or Latin-1: the lead byte of a character, then one or more that continue it. What fits is judged by ftfy,
# which takes 0.1 ms for a row and would else read every accent in the world.
_CONTINUATION = "\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122"
_TWO_BYTES = re.compile(f"[\u00c2-\u00f4][{_CONTINUATION}]")


def content(record: Record) -> str:
    """All that people wrote in ``record``."""
    return record.text if isinstance(record, Text) else "\n".join([message.content for message in record.messages])


def text_flags(text: str) -> int:
    """Damage to characters in ``text``, as bits of `Flag`."""
    flags = Flag.CONTROL if _CONTROL.search(text) else Flag(0)
    if text.isascii():
        return int(flags)
    if "\ufffd" in text:
        flags |= Flag.REPLACEMENT
    if any(is_bad(text[max(0, found.start() - 40) : found.end() + 40]) for found in _TWO_BYTES.finditer(text)):
        flags |= Flag.MOJIBAKE
    return int(flags)


def texts_flags(records: Sequence[Record | None]) -> Flags:
    """`text_flags` of each record; 0 for None."""
    together = "\n".join([content(record) for record in records if record is not None])
    if together.isascii() and len(together.encode().translate(None, _ASCII_CONTROLS)) == len(together):  # nearly always in English
        return np.zeros(len(records), np.uint8)
    return np.array([0 if record is None else text_flags(content(record)) for record in records], np.uint8)


def token_flags(flat: Flat) -> Flags:
    """What the numbers of supervised tokens tell of each example, as bits of `Flag`."""
    counts = flat.supervised()
    # a stretch of supervised tokens is a turn, and its last token ends it
    begins = flat.mask & ~np.concatenate([[False], flat.mask[:-1]])
    totals = np.concatenate([[0], np.cumsum(begins, dtype=np.int32)])
    turns = np.diff(totals[flat.offsets])
    flags = np.where(counts - turns < 2, int(Flag.TINY), 0)
    lengths = np.diff(flat.offsets)
    flags |= np.where(counts < MOSTLY_UNSUPERVISED_SHARE * lengths, int(Flag.UNSUPERVISED), 0)
    return flags.astype(np.uint8)


def findings(flags: Flags, where: Callable[[int], str]) -> list[Finding]:
    """How many examples have each flag, and where the first of them are; ``where`` names the place of a row."""
    found = []
    for flag, (name, advice) in _NAMES.items():
        rows = np.flatnonzero(flags & int(flag))
        if len(rows):
            found.append(Finding(name, len(rows), first_places(rows, where), advice))
    return found


def first_places(rows: Sequence[int] | npt.NDArray[np.int64], where: Callable[[int], str]) -> tuple[str, ...]:
    """The places of the first few of ``rows``."""
    return tuple(where(int(row)) for row in rows[:PLACES])
