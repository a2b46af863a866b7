"""Answers to questions, in batches: greedy or drawn, up to the end of the turn, and whether they are the expected ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from finetune.data.formats import Message
from finetune.data.render import Renderer
from finetune.model.head import causal_model
from finetune.model.virtual import virtual_tokens
from finetune.scoring import Scorer

_BATCH = 64
_ROOM = 8
"""Tokens in the cache of a batch, as a multiple of a scorer's micro-batch: keys and values take far less than a forward pass's states."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a continuation is chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts at which a continuation ends; they are cut off."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A continuation."""

    text: str
    ended: bool
    """Whether it ended itself, rather than at the limit."""


def answer(
    scorer: Scorer,
    renderer: Renderer,
    prompts: Sequence[tuple[Message, ...]],
    max_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The greedy continuation of each prompt, up to its end-of-turn token or ``max_tokens`` new tokens."""
    ids = [renderer.prompt(prompt) for prompt in prompts]
    return [found.text for found in continuations(scorer, renderer, ids, Decoding(max_tokens), advance)]


@torch.no_grad()
def continuations(
    scorer: Scorer,
    renderer: Renderer,
    prompts: Sequence[tuple[int, ...]],
    decoding: Decoding,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """How the model goes on after each prompt. What is drawn depends on the seed and on which prompts share a batch."""
    scorer.model.eval()
    found: list[Answer] = [Answer("", ended=False)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    lengths = [len(prompt) + decoding.max_new_tokens for prompt in prompts]
    batches = _batches(order, lengths, _ROOM * scorer.max_tokens, alike=bool(virtual_tokens(scorer.model)))
    with _seeded(decoding, scorer.device):
        for chosen in batches:
            answers = _continue(scorer, renderer, [prompts[index] for index in chosen], decoding)
            for index, one in zip(chosen, answers, strict=True):
                found[index] = one
            advance(len(chosen))
    return found


def _batches(order: Sequence[int], lengths: Sequence[int], room: int, *, alike: bool) -> Iterator[list[int]]:
    """``order``, by length, in batches whose tokens fit ``room``; ``alike``: of prompts of one length, since padding would stand between
    virtual tokens and the prompt."""
    for _, group in groupby(order, key=lambda index: lengths[index] if alike else 0):
        batch: list[int] = []
        for index in group:
            if batch and (len(batch) == _BATCH or (len(batch) + 1) * lengths[index] > room):
                yield batch
                batch = []
            batch.append(index)
        yield batch


@contextmanager
def _seeded(decoding: Decoding, device: torch.device) -> Iterator[None]:
    """Inside the block what is drawn follows the seed; afterwards the random state is as it was."""
    if not decoding.temperature:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(decoding.seed)
        yield


def _continue(scorer: Scorer, renderer: Renderer, prompts: Sequence[tuple[int, ...]], decoding: Decoding) -> list[Answer]:
    tokenizer = renderer.tokenizer
    width = max(map(len, prompts))
    tokens = torch.zeros((len(prompts), width), dtype=torch.int64)
    attention = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all continue at the same place
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    # the token that closes a turn is not always the tokenizer's eos (Gemma's <end_of_turn>)
    ends = sorted({token for token in (tokenizer.eos_token_id, renderer.end_of_turn) if token is not None})
    further = {"stopping_criteria": StoppingCriteriaList([_Stops(tokenizer, decoding.stop, width)])} if decoding.stop else {}
    with scorer.autocast(), _settings(scorer.model, ends, decoding):
        out = scorer.model.generate(input_ids=tokens.to(scorer.device), attention_mask=attention.to(scorer.device), **further)
    new = out[:, width:].cpu()
    ended = [bool(set(row) & set(ends)) for row in new.tolist()]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [_answer(text, decoding.stop, ended=done) for text, done in zip(texts, ended, strict=True)]


def _answer(text: str, stops: Sequence[str], *, ended: bool) -> Answer:
    whole = text
    for stop in stops:
        text = text.partition(stop)[0]
    return Answer(text.strip(), ended or text != whole)


class _Stops(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed for us
    """Ends a row once one of the texts stands in what is new."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int) -> None:
        """``start``: where the continuations begin."""
        self._tokenizer, self._stops, self._start = tokenizer, stops, start
        # a token has a byte at least: the last of them hold the whole text and the start of one more character
        self._tail = max(len(stop.encode()) for stop in stops) + 4

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """(n,) bool."""
        del scores
        recent = input_ids[:, max(self._start, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(recent.cpu(), skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self._stops) for text in texts], device=input_ids.device)


@contextmanager
def _settings(model: Any, ends: list[int], decoding: Decoding) -> Iterator[None]:
    """Inside the block the model generates as ``decoding`` says: its own defaults, such as a repetition penalty, do not apply."""
    core = causal_model(model)
    before = core.generation_config
    drawn = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    core.generation_config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **(drawn if decoding.temperature else {"do_sample": False}),
    )
    try:
        yield
    finally:
        core.generation_config = before


# --- comparing -----------------------------------------------------------------------------------------------------------------------


def is_exact(given: str, expected: str) -> bool:
    """Whether two answers are the same but for case, punctuation and spacing."""
    return _words(given) == _words(expected)


def token_f1(given: str, expected: str) -> float:
    """Harmonic mean of the shares of words that two answers have in common (SQuAD's, 1606.05250), words as `is_exact` sees them."""
    ours, theirs = _words(given), _words(expected)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
