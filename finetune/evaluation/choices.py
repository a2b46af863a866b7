"""Multiple choice by log-likelihood: which candidate answer does the model find likeliest.

A prompt is computed once and its keys and values serve all of its candidates, which is two to three times faster than scoring each
candidate with its own copy of the prompt and gives the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from finetune.data.formats import Conversation, Message
from finetune.data.render import Example, Renderer
from finetune.model.head import backbone, causal_model, has_plain_head, hidden_losses
from finetune.model.virtual import virtual_tokens
from finetune.scoring import Scorer

Scores = list[tuple[float, int]]
"""For each candidate: nats summed over its tokens, and their number."""


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

    answer: str
    scores: Mapping[str, tuple[float, int]]
    """For each choice: nats summed over its tokens, its end-of-turn token included, and their number."""

    @property
    def answer_loss(self) -> float:
        """Sum of nats over the answer's tokens."""
        return self.scores[self.answer][0]

    @property
    def answer_tokens(self) -> int:
        """Number of the answer's tokens."""
        return self.scores[self.answer][1]

    def is_right(self, among: Sequence[str] = ()) -> bool:
        """Whether the answer has the lowest mean loss a token (length-normalized) of the choices ``among``, by default of all."""
        means = {choice: self.scores[choice][0] / self.scores[choice][1] for choice in (*(among or self.scores), self.answer)}
        return bool(min(means, key=means.__getitem__) == self.answer)


@dataclass(frozen=True, slots=True)
class Continuations:
    """An item as ids."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    """What may follow the prompt."""

    @property
    def size(self) -> int:
        """Tokens that are computed."""
        return len(self.prompt) + sum(map(len, self.candidates))


def judge(scorer: Scorer, renderer: Renderer, items: Sequence[Item], advance: Callable[[int], None] = lambda _: None) -> list[Judged]:
    """Score every choice of every item as an assistant turn after its prompt, its end-of-turn token included."""
    examples = [[_example(renderer, item, choice) for choice in item.choices] for item in items]
    if _shares(scorer):
        scores = _shared(scorer, [_tokens(candidates) for candidates in examples], advance)
    else:
        scores = _separate(scorer, examples, advance)
    return [Judged(item.answer, dict(zip(item.choices, found, strict=True))) for item, found in zip(items, scores, strict=True)]


def score(scorer: Scorer, items: Sequence[Continuations], advance: Callable[[int], None] = lambda _: None) -> list[Scores]:
    """Nats and number of the tokens of each candidate of each item."""
    if _shares(scorer):
        return _shared(scorer, items, advance)
    return _separate(scorer, [[_alone(item.prompt, candidate) for candidate in item.candidates] for item in items], advance)


def _shares(scorer: Scorer) -> bool:
    """Whether candidates can follow one copy of their prompt: virtual tokens have no place in a cache that several share."""
    return has_plain_head(causal_model(scorer.model)) and not virtual_tokens(scorer.model)


def _alone(prompt: tuple[int, ...], candidate: tuple[int, ...]) -> Example:
    return Example((*prompt, *candidate), (*(False for _ in prompt), *(True for _ in candidate)), "choice")


def _example(renderer: Renderer, item: Item, choice: str) -> Example:
    return renderer.example(Conversation((*item.prompt, Message("assistant", choice)), item.prompt[-1].content), "last-turn")


def _separate(scorer: Scorer, examples: Sequence[Sequence[Example]], advance: Callable[[int], None]) -> list[Scores]:
    """Each candidate with its own copy of the prompt."""
    places = [(number, place) for number, candidates in enumerate(examples) for place in range(len(candidates))]
    scores: list[Scores] = [[(0.0, 0)] * len(candidates) for candidates in examples]
    for index, losses in scorer.losses([example for candidates in examples for example in candidates], advance):
        number, place = places[index]
        scores[number][place] = (float(losses.sum()), len(losses))
    return scores


def _tokens(candidates: Sequence[Example]) -> Continuations:
    start = candidates[0].mask.index(True)
    ends = [len(example.mask) - example.mask[::-1].index(True) for example in candidates]
    return Continuations(candidates[0].ids[:start], tuple(example.ids[start:end] for example, end in zip(candidates, ends, strict=True)))


@torch.no_grad()
def _shared(scorer: Scorer, items: Sequence[Continuations], advance: Callable[[int], None]) -> list[Scores]:
    """Each prompt once, its candidates after it."""
    scorer.model.eval()
    scores: list[Scores] = [[] for _ in items]
    for piece in _pieces(items, scorer.max_tokens):
        chosen = [items[index] for index in piece]
        with scorer.autocast():
            losses = _continuation_losses(causal_model(scorer.model), chosen, scorer.device)
        for index, found in zip(piece, losses, strict=True):
            scores[index] = found
        advance(len(piece))
    return scores


def _pieces(items: Sequence[Continuations], max_tokens: int) -> Iterator[list[int]]:
    """Items of one number of candidates and of similar length, about ``max_tokens`` together."""
    order = sorted(range(len(items)), key=lambda index: (len(items[index].candidates), items[index].size))
    piece: list[int] = []
    for index in order:
        fits = (len(piece) + 1) * items[index].size <= max_tokens
        if piece and not (fits and len(items[piece[0]].candidates) == len(items[index].candidates)):
            yield piece
            piece = []
        piece.append(index)
    if piece:
        yield piece


def _continuation_losses(model: Any, items: Sequence[Continuations], device: torch.device) -> list[Scores]:
    count = len(items[0].candidates)
    prompts, seen = _padded([item.prompt for item in items], device, left=True)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    first = backbone(model)(input_ids=prompts, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(count)
    ids, present = _padded([candidate for item in items for candidate in item.candidates], device)  # (items * count, c)
    after = torch.cat([seen.repeat_interleave(count, 0), present], dim=1)
    positions = after.cumsum(-1)[:, prompts.shape[1] :] - 1
    rest = backbone(model)(input_ids=ids, attention_mask=after, position_ids=positions.clamp(min=0), past_key_values=cache, use_cache=True)
    # The prompt's last position predicts the first token of every candidate; each token then predicts the next.
    before = first.last_hidden_state[:, -1:].repeat_interleave(count, 0)
    hidden = torch.cat([before, rest.last_hidden_state[:, :-1]], dim=1)  # (items * count, c, d)
    wanted = present.bool()
    losses = hidden_losses(hidden[wanted], model.get_output_embeddings(), ids[wanted]).double().cpu()
    sums = [(float(part.sum()), len(part)) for part in torch.split(losses, present.sum(-1).tolist())]
    return [sums[start : start + count] for start in range(0, len(sums), count)]


def _padded(rows: Sequence[tuple[int, ...]], device: torch.device, *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and presence (n, longest) of ``rows``, padded on the right, or on the left so that all end together."""
    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    present = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        present[number, place] = 1
    return ids.to(device), present.to(device)
