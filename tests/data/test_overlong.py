"""Conversations that are too long, cut between exchanges."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from finetune.config.data import Data
from finetune.data.overlong import exchanges, shorten
from finetune.data.records import Conversation, Message
from finetune.data.render import Example, Renderer
from finetune.errors import DataError


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer_dir: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))


def talk(*lengths: int, system: bool = True, silent: tuple[int, ...] = ()) -> Conversation:
    """Exchanges whose questions have ``lengths`` characters."""
    messages = [Message("system", "Be brief.")] if system else []
    for number, length in enumerate(lengths):
        messages.append(Message("user", f"{number}" + "q" * length))
        messages.append(Message("assistant", f"answer {number}", supervised=number not in silent))
    return Conversation(tuple(messages), "chat.jsonl:1")


def split(record: Conversation, renderer: Renderer, max_tokens: int, supervise: str = "assistant") -> list[Example]:
    data = Data.model_validate({"train": [{"source": "x"}], "max_tokens": max_tokens, "overlong": "split", "supervise": supervise})
    return [piece.example for piece in shorten(record, renderer.example(record, supervise), data, renderer)]  # type: ignore[arg-type]


def taught(examples: list[Example]) -> list[int]:
    return [token for example in examples for token, flag in zip(example.ids, example.mask, strict=True) if flag]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=9), st.integers(110, 250), st.booleans())
def test_pieces_fit_and_teach_what_the_whole_teaches(renderer: Renderer, lengths: list[int], max_tokens: int, system: bool) -> None:
    record = talk(*lengths, system=system)
    pieces = split(record, renderer, max_tokens)
    assert all(len(piece.ids) <= max_tokens for piece in pieces)
    assert taught(pieces) == taught([renderer.example(record)])
    head = renderer.prompt(record.messages[:1])[: 8 if system else 1]
    assert all(piece.ids[: len(head)] == head for piece in pieces)  # the system message is repeated
    for left, right in pairwise(pieces):  # greedy: no piece could have taken the next one's first exchange
        assert len(left.ids) + len(right.ids) > max_tokens
    assert [piece.where for piece in pieces] == [f"chat.jsonl:1 piece {number}" for number in range(1, len(pieces) + 1)]


def test_an_exchange_that_does_not_fit_is_an_error(renderer: Renderer) -> None:
    with pytest.raises(DataError, match="exchange 2 alone has") as caught:
        split(talk(5, 400, 5), renderer, 120)
    assert caught.value.problems[0].where == "chat.jsonl:1"


def test_pieces_that_teach_nothing_are_left_out(renderer: Renderer) -> None:
    record = talk(60, 60, 60, 60, silent=(0, 1))
    pieces = split(record, renderer, 180)
    assert pieces
    assert taught(pieces) == taught([renderer.example(record)])
    assert all(any(piece.mask) for piece in pieces)


def test_the_last_turn_keeps_what_fits_before_it(renderer: Renderer) -> None:
    record = talk(60, 60, 60, 60)
    (piece,) = split(record, renderer, 260, "last-turn")
    assert len(piece.ids) <= 260
    assert taught([piece]) == taught([renderer.example(record, "last-turn")])
    text = renderer.tokenizer.decode(piece.ids)
    assert "answer 2" in text
    assert "answer 0" not in text


def test_an_exchange_holds_what_follows_the_question() -> None:
    roles = ["system", "user", "user", "assistant", "tool", "assistant", "user", "assistant"]
    head, found = exchanges([Message(role, str(number)) for number, role in enumerate(roles)])
    assert [message.content for message in head] == ["0"]
    assert [[message.content for message in exchange] for exchange in found] == [["1", "2", "3", "4", "5"], ["6", "7"]]
    assert exchanges([Message("assistant", "a")]) == ((), [(Message("assistant", "a"),)])


@pytest.mark.parametrize("supervise", ["assistant", "all"])
def test_exchanges_without_any_weight_are_measured_and_left_out(renderer: Renderer, supervise: str) -> None:
    messages = [
        Message(message.role, message.content, supervised=number > 1)
        for number, message in enumerate(talk(60, 60, 60, system=False).messages)
    ]
    record = Conversation(tuple(messages), "chat.jsonl:1")
    pieces = split(record, renderer, 110, supervise)
    assert len(pieces) == 2
    assert all(any(piece.mask) for piece in pieces)
    assert "answer 0" not in "".join(renderer.tokenizer.decode(piece.ids) for piece in pieces)


def test_a_template_that_hides_its_turns_is_split_in_spite_of_a_turn_without_weight(renderer: Renderer) -> None:
    """Where a turn of weight 0 stands must be told for `all` alone, and the length needs no such thing."""
    tokenizer = copy.deepcopy(renderer.tokenizer)
    source = tokenizer.chat_template
    tokenizer.chat_template = "{% macro turns(messages) %}" + source.split("{% if add_generation_prompt %}")[0] + "{% endmacro %}"
    tokenizer.chat_template += "{{ turns(messages) }}{% if add_generation_prompt %}" + source.split("{% if add_generation_prompt %}")[1]
    hidden = Renderer(tokenizer)
    record = talk(60, 60, 60, system=False, silent=(0,))
    assert [piece.ids for piece in split(record, hidden, 180)] == [piece.ids for piece in split(record, renderer, 180)]
