"""What became of general English: loss on a text that has nothing to do with the domain, and everyday questions."""

from __future__ import annotations

from collections.abc import Callable

from finetune.data.formats import Message, Text
from finetune.data.general import general_questions, general_text
from finetune.data.render import Example, Renderer
from finetune.evaluation.choices import Item, judge
from finetune.evaluation.results import Measurement
from finetune.scoring import Scorer

_BLOCK = 512


def measure(scorer: Scorer, renderer: Renderer, advance: Callable[[int], None] = lambda _: None) -> Measurement:
    """Loss of the general text and accuracy on the general questions; neither should get worse."""
    blocks = _blocks(renderer.example(Text(general_text(), "general text")))
    items = [
        Item((Message("user", question.question),), (question.answer, *question.distractors), question.answer)
        for question in general_questions()
    ]
    loss = scorer.mean_loss(blocks, advance)
    values = {("general text: loss", "nats/token", sum(block.supervised for block in blocks), "same"): loss}
    if renderer.tokenizer.chat_template:  # a base model without one cannot be asked
        judged = judge(scorer, renderer, items, advance)
        values["general questions: four-way choice", "share", len(items), "same"] = sum(one.is_right() for one in judged) / len(judged)
    return Measurement(values, {})


def _blocks(text: Example) -> list[Example]:
    """The text in pieces of at most 512 tokens; each piece's first token is context only."""
    starts = range(0, len(text.ids) - 1, _BLOCK)
    return [_piece(text.ids[start : start + _BLOCK]) for start in starts]


def _piece(ids: tuple[int, ...]) -> Example:
    return Example(ids, (False, *(True for _ in ids[1:])), "general text")
