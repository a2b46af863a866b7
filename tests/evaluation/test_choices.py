"""Sharing a prompt between candidates changes speed, never a figure; greedy batches equal one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data.formats import Message
from finetune.data.render import Renderer
from finetune.evaluation.choices import Item, _example, _separate, judge
from finetune.evaluation.generation import answer, is_exact
from finetune.scoring import Scorer

ITEMS = [
    Item((Message("user", "What is " + "it " * number + "?"),), (f"The {number} title", "Another one of them", "No", "A"), "No")
    for number in range(1, 9)
] + [Item((Message("user", "Two?"),), ("yes", "no way"), "yes")]


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer_dir: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> torch.nn.Module:
    # untied: a tied random model only ever repeats its last token, which here is a newline
    return AutoModelForCausalLM.from_pretrained(make_tiny_model(tied=False, initializer_range=0.1), dtype=torch.float32)


@pytest.mark.parametrize("max_tokens", [1, 200, 5000])
def test_sharing_the_prompt_changes_nothing(model: torch.nn.Module, renderer: Renderer, max_tokens: int) -> None:
    scorer = Scorer(model, torch.device("cpu"), "fp32", max_tokens)
    apart = _separate(scorer, [[_example(renderer, item, choice) for choice in item.choices] for item in ITEMS], lambda _: None)
    for item, judged, scores in zip(ITEMS, judge(scorer, renderer, ITEMS), apart, strict=True):
        total, tokens = scores[item.choices.index(item.answer)]
        assert judged.answer_loss == pytest.approx(total, abs=1e-4)
        assert judged.answer_tokens == tokens
        assert judged.is_right() == (min(scores, key=lambda score: score[0] / score[1]) == (total, tokens))


def test_choices_agree_with_the_models_own_loss(model: torch.nn.Module, renderer: Renderer) -> None:
    """An oracle that shares no code: the model's own cross-entropy over the answer's tokens."""
    item = ITEMS[3]
    turns = [{"role": "user", "content": item.prompt[0].content}]
    prompt = renderer.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer_ids = renderer.tokenizer(item.answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(prompt) + answer_ids])
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([prompt + answer_ids]), labels=labels).loss
    judged = judge(Scorer(model, torch.device("cpu"), "fp32"), renderer, [item])[0]
    assert judged.answer_loss / judged.answer_tokens == pytest.approx(float(loss), abs=1e-5)


def test_batched_greedy_answers_equal_single_ones(model: torch.nn.Module, renderer: Renderer) -> None:
    scorer = Scorer(model, torch.device("cpu"), "fp32")
    prompts = [item.prompt for item in ITEMS]
    together = answer(scorer, renderer, prompts, 8)
    assert together == [answer(scorer, renderer, [prompt], 8)[0] for prompt in prompts]
    assert any(together)


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [("Candidal sepsis", "candidal  Sepsis.", True), ("Candidal", "Candidal sepsis", False), ("", "x", False), ("A, B", "A B", True)],
)
def test_exact_match_ignores_case_punctuation_and_spacing(given: str, expected: str, same: bool) -> None:
    assert is_exact(given, expected) is same
