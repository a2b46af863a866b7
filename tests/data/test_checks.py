"""Findings in single examples: damaged characters and answers that teach nothing."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.data.checks import Flag, findings, text_flags, texts_flags, token_flags
from finetune.data.examples import Flat
from finetune.data.records import Conversation, Message, Text
from finetune.data.render import Example


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("schön, naïve, 你好, „Spaß“, é’, ÄÖÜ“ and l’été", 0),
        ("plain\ttext\r\nwith lines", 0),
        ("sch\ufffdn", Flag.REPLACEMENT),
        ("a\x00b", Flag.CONTROL),
        ("a\x92b", Flag.CONTROL),
        ("schÃ¶n und grÃ¼n", Flag.MOJIBAKE),
        ("itâ€™s a testâ€”really", Flag.MOJIBAKE),
        ("x" * 500 + " schÃ¶n " + "y" * 500, Flag.MOJIBAKE),
    ],
)
def test_damage_to_characters(text: str, flag: int) -> None:
    assert text_flags(text) == flag


def test_damage_in_one_row_of_many_is_told_of_that_row() -> None:
    clean, damaged = Text("plain\ttext\r\n", "a:1"), Conversation((Message("user", "a\x00b"), Message("assistant", "sch\ufffdn")), "a:2")
    assert texts_flags([clean, None, clean]).tolist() == [0, 0, 0]
    assert texts_flags([clean, None, damaged]).tolist() == [0, 0, Flag.CONTROL | Flag.REPLACEMENT]
    assert texts_flags([Text("a\x7fb", "")]).tolist() == [Flag.CONTROL]
    assert not len(texts_flags([]))


def test_answers_by_their_tokens() -> None:
    def example(*runs: int) -> Example:
        """Stretches of tokens, every second one supervised."""
        mask = [bool(number % 2) for number, length in enumerate(runs) for _ in range(length)]
        return Example((7,) * len(mask), tuple(mask), "")

    examples = [example(3, 2), example(3, 3), example(3, 2, 3, 2), example(80, 4), example(3, 1), example(3, 9)]
    flags = token_flags(Flat.of(examples)).tolist()
    # one content token and the end; two; one in each of two turns; 4 of 84 supervised; only the end; plenty
    assert flags == [Flag.TINY, 0, 0, Flag.UNSUPERVISED, Flag.TINY, 0]


def test_findings_name_the_first_places() -> None:
    flags = np.array([0, 1, 3, 1, 2, 1], np.uint8)
    tiny, replaced = findings(flags, lambda row: f"f:{row}")
    assert (tiny.name, tiny.count, tiny.places) == ("tiny answers", 4, ("f:1", "f:2", "f:3"))
    assert (replaced.name, replaced.count, replaced.places) == ("replacement characters", 2, ("f:2", "f:4"))
    assert tiny.advice
    assert replaced.advice
