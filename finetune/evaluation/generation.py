"""Greedy answers to questions, in batches, and whether they are the expected ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig

from finetune.data.formats import Message
from finetune.data.render import Renderer
from finetune.model.head import causal_model
from finetune.model.virtual import virtual_tokens
from finetune.scoring import Scorer

_BATCH = 64


@torch.no_grad()
def answer(
    scorer: Scorer,
    renderer: Renderer,
    prompts: Sequence[tuple[Message, ...]],
    max_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The greedy continuation of each prompt, up to its end-of-turn token or ``max_tokens`` new tokens."""
    scorer.model.eval()
    ids = [renderer.prompt(prompt) for prompt in prompts]
    answers = [""] * len(ids)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    for chosen in _batches(order, ids, alike=bool(virtual_tokens(scorer.model))):
        for index, text in zip(chosen, _continue(scorer, renderer, [ids[index] for index in chosen], max_tokens), strict=True):
            answers[index] = text
        advance(len(chosen))
    return answers


def _batches(order: Sequence[int], ids: Sequence[tuple[int, ...]], *, alike: bool) -> Iterator[list[int]]:
    """``order`` in batches; ``alike``: of prompts of one length, since padding would stand between virtual tokens and the prompt."""
    for _, group in groupby(order, key=lambda index: len(ids[index]) if alike else 0):
        members = list(group)
        yield from (members[start : start + _BATCH] for start in range(0, len(members), _BATCH))


def _continue(scorer: Scorer, renderer: Renderer, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[str]:
    tokenizer = renderer.tokenizer
    width = max(map(len, prompts))
    tokens = torch.zeros((len(prompts), width), dtype=torch.int64)
    attention = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all continue at the same place
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    # the token that closes a turn is not always the tokenizer's eos (Gemma's <end_of_turn>)
    ends = [token for token in {tokenizer.eos_token_id, renderer.end_of_turn} if token is not None]
    with scorer.autocast(), _greedy(scorer.model, sorted(ends), max_tokens):
        out = scorer.model.generate(input_ids=tokens.to(scorer.device), attention_mask=attention.to(scorer.device))
    return [text.strip() for text in tokenizer.batch_decode(out[:, width:].cpu(), skip_special_tokens=True)]


@contextmanager
def _greedy(model: Any, ends: list[int], max_tokens: int) -> Iterator[None]:
    """Inside the block the model generates greedily: its own defaults, such as a repetition penalty, do not apply."""
    core = causal_model(model)
    before = core.generation_config
    core.generation_config = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, use_cache=True, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    try:
        yield
    finally:
        core.generation_config = before


def is_exact(given: str, expected: str) -> bool:
    """Whether two answers are the same but for case, punctuation and spacing."""
    return _plain(given) == _plain(expected)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
