"""Multiple choice by log-likelihood: which candidate answer does the model find likeliest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.data.formats import Conversation, Message
from finetune.data.render import Renderer
from finetune.scoring import Scorer


@dataclass(frozen=True, slots=True)
class Item:
    """A question with its candidate answers."""

    prompt: tuple[Message, ...]
    choices: tuple[str, ...]
    answer: str
    """One of ``choices``."""


@dataclass(frozen=True, slots=True)
class Judged:
    """How a model took one item."""

    right: bool
    """Whether the answer has the lowest mean loss a token of all choices (length-normalized)."""
    answer_loss: float
    """Sum of nats over the answer's tokens, its end-of-turn token included."""
    answer_tokens: int


def judge(scorer: Scorer, renderer: Renderer, items: Sequence[Item], advance: Callable[[int], None] = lambda _: None) -> list[Judged]:
    """Score every choice of every item as an assistant turn after its prompt."""
    pairs = [(number, choice) for number, item in enumerate(items) for choice in item.choices]
    examples = [
        renderer.example(Conversation((*items[number].prompt, Message("assistant", choice)), f"question {number + 1}"), "last-turn")
        for number, choice in pairs
    ]
    scores: dict[tuple[int, str], tuple[float, int]] = {}
    for index, losses in scorer.losses(examples, advance):
        scores[pairs[index]] = (float(losses.sum()), len(losses))
    return [_judged(item, {choice: scores[number, choice] for choice in item.choices}) for number, item in enumerate(items)]


def _judged(item: Item, scores: dict[str, tuple[float, int]]) -> Judged:
    total, tokens = scores[item.answer]
    best = min(scores, key=lambda choice: scores[choice][0] / scores[choice][1])
    return Judged(best == item.answer, total, tokens)
