"""What became of general English: loss on a text that has nothing to do with the domain, and everyday questions."""

from __future__ import annotations

from collections.abc import Callable

from finetune.data.formats import Message
from finetune.data.general import general_blocks, general_questions
from finetune.data.render import Renderer
from finetune.evaluation.choices import Item, judge
from finetune.evaluation.results import Measurement
from finetune.scoring import Scorer


def measure(scorer: Scorer, renderer: Renderer, advance: Callable[[int], None] = lambda _: None) -> Measurement:
    """Loss of the general text and accuracy on the general questions; neither should get worse."""
    blocks = general_blocks(renderer)
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
