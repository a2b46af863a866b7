"""The rows that every tool trains on."""

from __future__ import annotations

import json
import random
import statistics
from itertools import count
from pathlib import Path

import pytest

from benchmarks.engine import data


def test_lengths_are_lognormal_whatever_the_seed() -> None:
    found = data.lengths(600, random.Random(0))
    assert sorted(found) == sorted(data.lengths(600, random.Random(1)))
    assert found != data.lengths(600, random.Random(1))
    assert statistics.median(found) == pytest.approx(data.MEDIAN_CHARACTERS, rel=0.01)
    assert max(found) > 20 * data.MEDIAN_CHARACTERS
    assert statistics.median(data.lengths(600, random.Random(0), scale=4)) == pytest.approx(4 * data.MEDIAN_CHARACTERS, rel=0.01)


def test_a_row_has_about_the_length_and_always_an_answer() -> None:
    facts = (f"Fact number {number} is true." for number in count())
    for length in (10, 100, 3000):
        question, answer = data.conversation("Cholera", facts, length, 0.3)["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert "Cholera" in question["content"]
        assert answer["content"].endswith(".")
        whole = len(question["content"]) + len(answer["content"])
        assert length - 60 < whole < length + 100


def test_the_classification_gives_the_same_rows_again_and_asks_nothing_twice() -> None:
    pytest.importorskip("simple_icd_10_cm")
    train, validation = data.classification_rows(40, 8)
    assert (train, validation) == data.classification_rows(40, 8)
    asked = [row["messages"][0]["content"].rpartition("Describe ")[2] for row in train + validation]
    assert len(set(asked)) == 48


@pytest.mark.real
def test_the_template_writes_what_the_models_own_does_and_marks_the_answer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from finetune.model.builtin import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("builtin:smollm2-135m"))
    files = data.write(tmp_path, train=20, validation=4)
    rows = [json.loads(line)["messages"] for line in files.train.read_text().splitlines()]
    for row, encoded in zip(rows, data.encode(files.train, tokenizer, data.TEMPLATE), strict=True):
        assert encoded.ids == tokenizer.apply_chat_template(row, return_dict=True)["input_ids"]
        learned = tokenizer.decode([token for token, flag in zip(encoded.ids, encoded.supervised, strict=True) if flag])
        assert learned == row[1]["content"] + "<|im_end|>"


@pytest.mark.real
def test_this_project_learns_the_same_words_as_its_peers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from finetune.data.records import Conversation, Message
    from finetune.data.render import Renderer
    from finetune.model.builtin import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("builtin:smollm2-135m"))
    files = data.write(tmp_path, train=20, validation=4)
    encoded = data.encode(files.train, tokenizer, data.TEMPLATE)
    rows = [json.loads(line)["messages"] for line in files.train.read_text().splitlines()]
    records = [Conversation(tuple(Message(**turn) for turn in row), "row") for row in rows]
    for own, other in zip(Renderer(tokenizer).examples(records, "assistant"), encoded, strict=True):
        assert list(own.ids) == other.ids
        assert list(own.mask) == other.supervised
