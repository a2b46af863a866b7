"""What the model answers while it trains: the same prompts every time, greedily, without a trace in the training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.config.schema import Config
from finetune.data.records import Message
from finetune.data.render import Example, Renderer
from finetune.errors import DataError
from finetune.model.greedy import continuation, undisturbed
from finetune.scoring import Scorer
from finetune.training.metrics import Sample

_BEGINNING = 32
"""Most tokens of a text without turns that are given; half of them, where it is shorter."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One thing to ask."""

    text: str
    """As it is shown."""
    ids: tuple[int, ...]  # (t,)


@dataclass(frozen=True, slots=True)
class Sampler:
    """Everything that samples need besides the model."""

    prompts: tuple[Prompt, ...]
    ends: tuple[int, ...]
    """Tokens that end an answer."""
    max_tokens: int
    renderer: Renderer

    def sample(self, scorer: Scorer, gives_up: object = False, *, in_step: bool = False) -> tuple[tuple[Sample, ...], float] | None:
        """The answers and the seconds they took; None where ``gives_up``, such as a request to stop, became true.

        ``in_step``: every process takes part, since the blocks of the model are shared out.
        """
        began = time.perf_counter()
        found = []
        with undisturbed(scorer.model, scorer.device), scorer.autocast():
            for prompt in self.prompts:
                if gives_up and not in_step:  # processes that go in step make the same calls, whoever was signalled
                    break
                ids = continuation(scorer.model, prompt.ids, self.ends, self.max_tokens, lambda: bool(gives_up), in_step=in_step)
                text = self.renderer.tokenizer.decode(ids, skip_special_tokens=True)
                found.append(Sample(prompt.text, text.strip()))
        return None if gives_up else (tuple(found), time.perf_counter() - began)


def make_sampler(config: Config, renderer: Renderer, validation: Sequence[Example]) -> Sampler | None:
    """What ``config.train.samples`` asks for; None where it asks for nothing. DataError for a prompt that the tokenizer cannot take."""
    asked = config.train.samples
    if asked is None:
        return None
    if asked.prompts:
        prompts = tuple(_given(text, renderer, f"train.samples.prompts.{number}") for number, text in enumerate(asked.prompts))
    else:
        prompts = tuple(_of_row(validation[number], renderer) for number in range(min(asked.rows, len(validation))))
    # the token that closes a turn is not always the tokenizer's eos (Gemma's <end_of_turn>)
    ends = {token for token in (renderer.tokenizer.eos_token_id, renderer.end_of_turn) if token is not None}
    return Sampler(prompts, tuple(sorted(ends)), asked.max_tokens, renderer)


def _given(text: str, renderer: Renderer, where: str) -> Prompt:
    if renderer.tokenizer.chat_template:
        return Prompt(text, renderer.prompt((Message("user", text),), where))
    for control in renderer.control_tokens:
        if control in text:
            raise DataError(f"the text contains {control!r}, which is a control token of this model", where=where, fix="leave it out")
    ids = list(renderer.tokenizer(text)["input_ids"])
    return Prompt(text, tuple(ids[:-1] if ids[-1:] == [renderer.tokenizer.eos_token_id] else ids))


def _of_row(row: Example, renderer: Renderer) -> Prompt:
    """What stands before the first token that carries loss; of a text that carries loss from its beginning, that beginning."""
    first = row.mask.index(True)
    ids = row.ids[: first if first > 1 else max(1, min(_BEGINNING, len(row.ids) // 2))]
    return Prompt(renderer.tokenizer.decode(ids, skip_special_tokens=True).strip(), ids)
