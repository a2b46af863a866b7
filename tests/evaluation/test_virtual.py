"""Virtual tokens in evaluation: answers and choices see them, whatever is batched together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from finetune.config.schema import NoQuantization, Tuning
from finetune.data.formats import Message
from finetune.data.render import Renderer
from finetune.evaluation.choices import Item, judge
from finetune.evaluation.generation import answer
from finetune.model.adapters import attach, switched_off
from finetune.model.load import load_base, load_tokenizer
from finetune.scoring import Scorer

QUESTIONS = ["What is it?", "Which disease?", "Doctors also call this condition by another name, do they not?", "What is at?"]
PROMPTS = [(Message("user", text),) for text in QUESTIONS]


@pytest.fixture(scope="module")
def talkative(make_tiny_model: Callable[..., Path]) -> Path:
    """A model whose weights are large enough that it does not end every answer at once."""
    return make_tiny_model(tied=False, initializer_range=0.3)


@pytest.fixture(params=["prompt", "prefix"])
def scorer(request: pytest.FixtureRequest, talkative: Path) -> Scorer:
    tuning = TypeAdapter(Tuning).validate_python({"method": request.param, "tokens": 6})
    torch.manual_seed(0)
    model: Any = attach(load_base(talkative, NoQuantization(), torch.float32, torch.device("cpu")), tuning)
    for parameter in model.parameters():  # large enough that tokens which are left out change every answer
        if parameter.requires_grad:
            parameter.data.normal_()
    return Scorer(model, torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def renderer(tiny_model_dir: Path) -> Renderer:
    return Renderer(load_tokenizer(tiny_model_dir))


def test_answers_do_not_depend_on_what_is_asked_beside(scorer: Scorer, renderer: Renderer) -> None:
    together = answer(scorer, renderer, PROMPTS, 8)
    assert any(together)
    assert together == [answer(scorer, renderer, [prompt], 8)[0] for prompt in PROMPTS]
    with switched_off(scorer.model):
        assert together != answer(scorer, renderer, PROMPTS, 8)


def test_choices_are_scored_with_the_virtual_tokens(scorer: Scorer, renderer: Renderer) -> None:
    items = [Item(prompt, ("by another name", "the disease", "of it"), "of it") for prompt in PROMPTS]
    together = [judged.scores for judged in judge(scorer, renderer, items)]
    for item, scores in zip(items, together, strict=True):
        alone = judge(scorer, renderer, [item])[0].scores
        assert {name: value[0] for name, value in alone.items()} == pytest.approx(
            {name: value[0] for name, value in scores.items()}, abs=1e-4
        )
    with switched_off(scorer.model):
        off = [judged.scores for judged in judge(scorer, renderer, items)]
    assert abs(off[0]["of it"][0] - together[0]["of it"][0]) > 1e-3
