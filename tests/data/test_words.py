"""Tokenizing word by word gives the tokens of the whole text, and is not tried where that is not certain."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from finetune.data import words
from finetune.data.general import general_text
from finetune.data.words import Words, sees_no_further

LLAMA3, QWEN = sorted(words._EXPRESSIONS, key=len, reverse=True)
SHAPES = {
    "gpt2": pre.ByteLevel(add_prefix_space=False),
    "smollm2": pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]),
    "llama3": pre.Sequence([pre.Split(Regex(LLAMA3), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "qwen": pre.Sequence([pre.Split(Regex(QWEN), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]),
}
UNFIT = {
    "spaces in front": pre.ByteLevel(add_prefix_space=True),
    "no expression": pre.ByteLevel(add_prefix_space=False, use_regex=False),
    "metaspace": pre.Metaspace(),
    "another expression": pre.Sequence([pre.Split(Regex(r"\w+ \w+"), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "removed": pre.Sequence([pre.Split(Regex(QWEN), "removed"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]),
}


@cache
def backend(shape: str) -> Tokenizer:
    """Byte-level BPE whose merges were learned without any cut, so that only the pre-tokenizer keeps them from crossing spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False)
    text = general_text()[:20_000]
    runs = ["".join(run) * 9 for length in (2, 3, 4) for run in product(" \n\t", repeat=length)]  # or runs of white space had no tokens
    tokenizer.train_from_iterator([*[text[start : start + 200] for start in range(0, len(text), 200)], *runs], trainer)
    tokenizer.pre_tokenizer = SHAPES[shape]
    if shape == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def direct(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)] if texts else []


pieces = st.sampled_from(
    [
        "the",
        "of",
        "don't",
        "it's",
        "42",
        "2026-11-22",
        "a1b2",
        "…",
        "—",
        ",",
        "x.\n\nY",
        "<tool>",
        "ünï",
        "e\u0301",
        "\u0301",
        "漢字",
        "\U0001f600",
    ]
)
gaps = st.sampled_from([" ", " ", " ", " ", "  ", "\n", " \n", "\n \n", "\t \t", "\t", "\u00a0", "\u2003 ", "\x1c", ""])
texts = st.lists(st.tuples(pieces | st.text(max_size=4), gaps), max_size=12).map(lambda parts: "".join(map("".join, parts)))


@pytest.mark.parametrize("shape", SHAPES)
@given(rows=st.lists(texts, min_size=1, max_size=6))
def test_words_give_the_tokens_of_the_text(shape: str, rows: list[str]) -> None:
    tokenizer = backend(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "_NEW_SHARE", 2)
        found = Words(lambda texts: direct(tokenizer, list(texts)))
        assert found.ids(rows) == direct(tokenizer, rows)
        assert found.ids(rows[::-1]) == direct(tokenizer, rows[::-1])  # now known


def test_merges_would_cross_a_space_if_nothing_cut_there() -> None:
    tokenizer = backend("gpt2")
    assert any("\u0120" in token[1:] and token.strip("\u0120") for token in tokenizer.get_vocab())  # else the test above could not fail


@pytest.mark.parametrize("shape", SHAPES)
def test_known_tokenizers_are_fit(shape: str) -> None:
    assert sees_no_further(backend(shape), ["<tool>"])
    assert not sees_no_further(backend(shape), ["<a tool>"])


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT)
def test_others_are_not(unfit: pre.PreTokenizer) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = unfit
    assert not sees_no_further(tokenizer, [])


def test_nor_are_models_and_normalizers_that_look_around() -> None:
    for model in (models.BPE(dropout=0.1), models.WordLevel({"a": 0}, unk_token="a"), models.Unigram()):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = SHAPES["gpt2"]
        assert not sees_no_further(tokenizer, [])
    tokenizer = Tokenizer(models.BPE())
    assert not sees_no_further(tokenizer, [])
    tokenizer.pre_tokenizer, tokenizer.normalizer = SHAPES["gpt2"], normalizers.Prepend("x")
    assert not sees_no_further(tokenizer, [])


def test_each_word_is_encoded_once_and_new_ones_are_not_worth_a_call_each() -> None:
    asked: list[str] = []

    def count(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return [[len(text)] for text in texts]

    found = Words(count)
    found.ids(["one two three"])
    assert asked == ["one two three"]
    asked.clear()
    found.ids(["one two"] * 10)
    assert sorted(asked) == [" two", "one"]
    asked.clear()
    assert found.ids(["one two two"] * 3) == [[3, 4, 4]] * 3
    assert asked == []


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_KNOWN", 10)
    tokenizer = backend("gpt2")
    found = Words(lambda texts: direct(tokenizer, list(texts)))
    for batch in range(20):
        rows = [f"w{batch}a w{batch}b w{batch}c"] * 10 + ["x" * 100 + " y"] * 10
        assert found.ids(rows) == direct(tokenizer, rows)
        assert len(found._later) < 20
    assert not any(len(word) > 64 for word in (*found._first, *found._later))
