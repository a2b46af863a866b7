"""Closed-book questions about the facts of a run, by arm: what was learned beyond style.

Trained facts are asked in wordings that no training row has. Facts that were never trained are the control: what they gain is style;
substance is the gain of trained facts minus the gain of the control (2309.14316 gives the idea of held-out individuals).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finetune.config.schema import Icd10cm
from finetune.data.formats import Message
from finetune.data.icd10cm import Question, questions
from finetune.data.render import Renderer
from finetune.evaluation.choices import Item, Judged, judge
from finetune.evaluation.generation import answer, is_exact
from finetune.evaluation.results import Measurement
from finetune.scoring import Scorer

ARMS = {
    "trained as documents and questions": ("questions",),
    "trained as documents only": ("documents",),
    "all trained facts": ("questions", "documents"),
    "never trained (control)": ("control",),
}


def ask(settings: Icd10cm, wordings: int) -> tuple[Question, ...]:
    """The test questions about the facts of ``settings``."""
    return questions(settings, wordings)


def measure(
    scorer: Scorer,
    renderer: Renderer,
    asked: Sequence[Question],
    *,
    generate: bool,
    samples: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Measurement:
    """Answer loss, four-way choice and (with ``generate``) exact match for each arm, and ``samples`` answers."""
    items = [Item(_prompt(question), (*question.choices, *question.rivals), question.answer) for question in asked]
    judged = judge(scorer, renderer, items, advance)
    shown = _samples(asked, samples)
    wanted = list(range(len(asked))) if generate else shown
    longest = max((len(renderer.tokenizer(question.answer)["input_ids"]) for question in asked), default=1)
    texts = answer(scorer, renderer, [items[index].prompt for index in wanted], longest + 4, advance) if wanted else []
    answers = dict(zip(wanted, texts, strict=True))
    values: dict[tuple[str, str, int, str], float] = {}
    for arm, members in ARMS.items():
        chosen = [index for index, question in enumerate(asked) if question.fact.arm in members]
        if chosen:
            values |= _figures(arm, [(asked[index], judged[index]) for index in chosen])
            if generate:
                exact = [is_exact(answers[index], asked[index].answer) for index in chosen]
                values[f"{arm}: exact match", "share", len(chosen), _better(arm)] = sum(exact) / len(exact)
    return Measurement(
        values, {(_kind(asked[index]), asked[index].prompt[-1]["content"], asked[index].answer): answers[index] for index in shown}
    )


def _prompt(question: Question) -> tuple[Message, ...]:
    return tuple(Message(turn["role"], turn["content"]) for turn in question.prompt)


def _figures(arm: str, pairs: Sequence[tuple[Question, Judged]]) -> dict[tuple[str, str, int, str], float]:
    n, better = len(pairs), _better(arm)
    tokens = sum(judged.answer_tokens for _, judged in pairs)
    return {
        (f"{arm}: answer loss", "nats/token", n, "lower" if better == "higher" else better): sum(j.answer_loss for _, j in pairs) / tokens,
        (f"{arm}: choice of four, near titles", "share", n, better): sum(j.is_right(q.choices) for q, j in pairs) / n,
        # Trained titles are familiar, whichever term they belong to: only a model that has bound the two prefers the answer to these.
        (f"{arm}: choice of four, titles of the arm", "share", n, better): sum(j.is_right(q.rivals) for q, j in pairs) / n,
    }


def _better(arm: str) -> str:
    return "same" if "control" in arm else "higher"


def _kind(question: Question) -> str:
    return next(name for name, members in ARMS.items() if question.fact.arm in members)


def _samples(asked: Sequence[Question], count: int) -> list[int]:
    """``count`` questions, the arms in turn."""
    by_arm = [[i for i, question in enumerate(asked) if question.fact.arm == arm] for arm in ("questions", "documents", "control")]
    mixed = [arm[place] for place in range(count) for arm in by_arm if place < len(arm)]
    return mixed[:count]
