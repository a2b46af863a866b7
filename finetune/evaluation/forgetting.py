"""What became of general English: loss on a text that has nothing to do with the domain, and everyday questions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from finetune.config.figure_names import GENERAL_QUESTIONS, GENERAL_TEXT
from finetune.data.formats import Message
from finetune.data.general import general_blocks, general_questions
from finetune.data.render import Renderer
from finetune.evaluation.choices import Item, judge
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.statistics import Quantity, mean, ratio
from finetune.scoring import Scorer

_NEIGHBOURS = 64
"""Tokens of a text that are drawn together: those near each other are hard or easy together."""


def measure(scorer: Scorer, renderer: Renderer, advance: Callable[[int], None] = lambda _: None) -> Measurement:
    """Loss of the general text and accuracy on the general questions; neither should get worse."""
    quantities = [_text_loss(scorer, renderer, advance)]
    if renderer.tokenizer.chat_template:  # a base model without one cannot be asked
        items = [
            Item((Message("user", question.question),), (question.answer, *question.distractors), question.answer)
            for question in general_questions()
        ]
        right = [one.is_right() for one in judge(scorer, renderer, items, advance)]
        quantities.append(mean(GENERAL_QUESTIONS, "share", "higher", right, range(len(right))))
    return Measurement(tuple(quantities))


def _text_loss(scorer: Scorer, renderer: Renderer, advance: Callable[[int], None]) -> Quantity:
    blocks = general_blocks(renderer)
    found = dict(scorer.losses(blocks, advance))
    pieces = [piece for place in range(len(blocks)) for piece in torch.split(found[place], _NEIGHBOURS)]
    items = ([float(piece.sum()) for piece in pieces], [len(piece) for piece in pieces])
    return ratio(GENERAL_TEXT, "nats/token", "lower", items, range(len(pieces)))
