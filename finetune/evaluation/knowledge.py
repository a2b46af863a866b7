"""Closed-book questions about the facts of a run, by arm: what was learned beyond style.

Trained facts are asked in wordings that no training row has. Facts that were never trained are the control: what they gain is style;
substance is the gain of trained facts minus the gain of the control (2309.14316 gives the idea of held-out individuals).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from finetune.config.schema import Icd10cm
from finetune.data.formats import Message
from finetune.data.icd10cm_questions import Question, questions
from finetune.data.render import Renderer
from finetune.evaluation.choices import Item, Judged, judge
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.generation import answer, is_exact
from finetune.evaluation.results import Change, Headline
from finetune.evaluation.statistics import Quantity, Sampled, mean, ratio, sampled_change, verdict
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
    quantities: list[Quantity] = []
    for arm, members in ARMS.items():
        chosen = [index for index, question in enumerate(asked) if question.fact.arm in members]
        if chosen:
            quantities += _quantities(arm, [(asked[index], judged[index]) for index in chosen])
            if generate:
                exact = [is_exact(answers[index], asked[index].answer) for index in chosen]
                quantities.append(mean(f"{arm}: exact match", "share", _better(arm), exact, [asked[index].fact.code for index in chosen]))
    return Measurement(
        tuple(quantities),
        {(_kind(asked[index]), asked[index].prompt[-1]["content"], asked[index].answer): answers[index] for index in shown},
    )


def _prompt(question: Question) -> tuple[Message, ...]:
    return tuple(Message(turn["role"], turn["content"]) for turn in question.prompt)


def _quantities(arm: str, pairs: Sequence[tuple[Question, Judged]]) -> list[Quantity]:
    better = _better(arm)
    facts = [question.fact.code for question, _ in pairs]
    losses = ([judged.answer_loss for _, judged in pairs], [judged.answer_tokens for _, judged in pairs])
    near = [judged.is_right(question.choices) for question, judged in pairs]
    # Trained titles are familiar, whichever term they belong to: only a model that has bound the two prefers the answer to these.
    rivals = [judged.is_right(question.rivals) for question, judged in pairs]
    return [
        ratio(f"{arm}: answer loss", "nats/token", "lower" if better == "higher" else better, losses, facts),
        mean(f"{arm}: choice of four, near titles", "share", better, near, facts),
        mean(f"{arm}: choice of four, titles of the arm", "share", better, rivals, facts),
    ]


def _better(arm: str) -> str:
    return "same" if "control" in arm else "higher"


def _kind(question: Question) -> str:
    return next(name for name, members in ARMS.items() if question.fact.arm in members)


def _samples(asked: Sequence[Question], count: int) -> list[int]:
    """``count`` questions, the arms in turn."""
    by_arm = [[i for i, question in enumerate(asked) if question.fact.arm == arm] for arm in ("questions", "documents", "control")]
    mixed = [arm[place] for place in range(count) for arm in by_arm if place < len(arm)]
    return mixed[:count]


# --- what was learned, in four numbers -----------------------------------------------------------------------------------------------

HEADLINES = ("answer loss", "choice of four, titles of the arm")
"""The figures that conclusions are drawn from."""
_TRAINED, _ASKED, _READ, _CONTROL = "all trained facts", *tuple(ARMS)[:2], tuple(ARMS)[3]


def headlines(measured: Mapping[str, Mapping[str, Measurement]]) -> tuple[Headline, ...]:
    """Style, substance, extraction gap and efficiency with their intervals, of every system against the first; ``measured`` is by task.

    Style is the change of the control; substance what trained facts change beyond it; the extraction gap what facts that were also asked
    about in training gain beyond those that were only read; efficiency the substance for each 0.01 nat of general text forgotten.
    """
    systems = measured.get("knowledge", {})
    first = next(iter(systems), "")
    found: list[Headline] = []
    for system in [*systems][1:]:
        for measure_name in HEADLINES:
            found += _conclusions(system, measure_name, systems[first], systems[system])
        found += _efficiency(system, first, measured)
    return tuple(found)


def _conclusions(system: str, measure_name: str, before: Measurement, after: Measurement) -> Iterator[Headline]:
    changes = [_arm_change(arm, measure_name, before, after) for arm in (_TRAINED, _CONTROL, _ASKED, _READ)]
    trained, control, asked, read = changes
    quantity = before.named(f"{_CONTROL}: {measure_name}")
    if quantity is None:
        return
    aim = "lower" if measure_name == "answer loss" else "higher"
    for name, better, number in (
        ("style", "same", control),
        ("substance", aim, trained - control if trained and control else None),
        ("extraction gap", aim, asked - read if asked and read else None),
    ):
        if number:
            yield Headline(name, measure_name, quantity.unit, better, system, _stated(number, better))


def _arm_change(arm: str, measure_name: str, before: Measurement, after: Measurement) -> Sampled | None:
    one, other = before.named(f"{arm}: {measure_name}"), after.named(f"{arm}: {measure_name}")
    return sampled_change(one, other, [*ARMS].index(arm)) if one and other else None


def _efficiency(system: str, first: str, measured: Mapping[str, Mapping[str, Measurement]]) -> Iterator[Headline]:
    """Nothing where no general text was measured, or where it cannot be told that any was forgotten: a ratio to zero says nothing."""
    general = measured.get("forgetting", {})
    if system not in general:
        return
    before, after = (general[name].named("general text: loss") for name in (first, system))
    trained, control = (
        _arm_change(arm, HEADLINES[0], *(measured["knowledge"][name] for name in (first, system))) for arm in (_TRAINED, _CONTROL)
    )
    if not (before and after and trained and control):
        return
    forgotten = sampled_change(before, after, len(ARMS))
    if forgotten.interval and forgotten.interval[0] > 0:
        number = (control - trained).over(forgotten).times(0.01)
        yield Headline("efficiency", HEADLINES[0], "nats/token for 0.01 forgotten", "higher", system, _stated(number, "higher"))


def _stated(number: Sampled, better: str) -> Change:
    low, high = number.interval or (None, None)
    p = number.p if number.interval else None
    return Change(number.value, low, high, p, verdict(number.interval, 1.0 if p is None else p, better, number.clusters))
