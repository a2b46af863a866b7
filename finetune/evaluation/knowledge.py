"""Closed-book questions about the facts of a run, by arm: what was learned beyond style.

Trained facts are asked in wordings that no training row has. Facts that were never trained are the control: what they gain is style. The
same facts can also be asked in trained words (memory), reversed, about further relations, after five worked examples (format alone) and
with the document in the prompt (can it be answered at all?).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from finetune.config.data import Icd10cm
from finetune.config.evaluation import KnowledgeTask
from finetune.config.figure_names import (
    ASKED,
    BINDING,
    CONTROL,
    FORCED,
    FREE,
    LABELS,
    LOSS,
    NEAR,
    OF_SECTIONS,
    READ,
    RIVALS,
    TITLE_FORM,
    TRAINED,
    WRONG_TITLES,
)
from finetune.config.knowledge_checks import taught_by
from finetune.data.formats import Conversation, Message
from finetune.data.icd10cm import trained_by
from finetune.data.icd10cm_questions import Kind, Question, controlled, digest, questions_about
from finetune.data.render import Example, Renderer
from finetune.evaluation.choices import Continuations, Judged, score
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.generation import answer, is_exact
from finetune.evaluation.likeliest import likeliest
from finetune.evaluation.statistics import Quantity, mean, ratio
from finetune.scoring import Scorer

ARMS = {ASKED: ("questions",), READ: ("documents",), TRAINED: ("questions", "documents"), CONTROL: ("control",)}
_ENDS = (".", "?", "!", ":", ",")


@dataclass(frozen=True, slots=True)
class Section:
    """Questions of one kind."""

    label: str
    asked: tuple[Question, ...]

    def name(self, arm: str) -> str:
        """What comes before the colon in the names of figures."""
        return f"{arm}, {self.label}" if self.label else arm


def sections(sources: Sequence[Icd10cm], task: KnowledgeTask) -> tuple[Section, ...]:
    """The questions that ``task`` asks about the facts of ``sources``: of all together each code once, in one arm."""

    def asked_of(kind: Kind) -> tuple[Question, ...]:
        return questions_about(trained_by(sources, taught_by(kind)), task.questions_per_fact, kind)

    kinds = [Section(LABELS[kind], asked_of(kind)) for kind in task.asks]
    controls = [Section(LABELS[control], controlled(sources, asked_of("knowledge"), control)) for control in task.controls]
    return (*kinds, *controls)


def digests(sources: Sequence[Icd10cm], task: KnowledgeTask) -> dict[str, str]:
    """sha256 of the questions of each section, by what follows the arm in the names of its figures: equal ones can be compared."""
    return {section.label: digest(section.asked) for section in sections(sources, task)}


def is_same(one: Sequence[Icd10cm], other: Sequence[Icd10cm], task: KnowledgeTask) -> bool:
    """Whether ``task`` asks the same of both, and each fact is in the same arm of both: else one cannot be judged by the other's.

    Right and shuffled answers are the same benchmark where a run has but one of them; so is any replay.
    """
    kinds = {*task.asks, *(("knowledge",) if task.controls else ())}
    taught = [{relation for source in sources for relation in source.relations} for sources in (one, other)]
    if any(bool(taught[0] & {*taught_by(kind)}) != bool(taught[1] & {*taught_by(kind)}) for kind in kinds):
        return False
    return digests(one, task) == digests(other, task)


@dataclass(frozen=True, slots=True)
class _Marked:
    """A question and how a model took it."""

    question: Question
    judged: Judged
    hits: int
    """Tokens of the answer that are the likeliest after those before them."""
    text: str | None
    """The free answer, where one was asked for."""


def measure(
    scorer: Scorer,
    renderer: Renderer,
    asked: Sequence[Section],
    *,
    generate: bool,
    samples: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Measurement:
    """Every figure of ``asked``, and ``samples`` free answers to the first section; ``generate``: free answers to all its questions."""
    quantities: list[Quantity] = []
    answers: dict[tuple[str, str, str], str] = {}
    for place, section in enumerate(asked):
        shown = _samples(section.asked, samples) if place == 0 else []
        wanted = range(len(section.asked)) if generate and place == 0 else shown
        marked = _mark(scorer, renderer, section.asked, wanted, advance)
        arms = ARMS if not section.label else {arm: ARMS[arm] for arm in OF_SECTIONS}
        for arm, members in arms.items():
            chosen = [one for one in marked if one.question.fact.arm in members]
            quantities += _quantities(section.name(arm), arm, chosen, free=generate and place == 0) if chosen else ()
        if place == 0:
            quantities += _style(marked, free=generate)
            answers = {_shown(section.asked[index]): marked[index].text or "" for index in shown}
    return Measurement(tuple(quantities), answers)


def _mark(
    scorer: Scorer, renderer: Renderer, asked: Sequence[Question], wanted: Sequence[int], advance: Callable[[int], None]
) -> list[_Marked]:
    """All of ``asked`` as the model takes them, the ``wanted`` ones answered freely too."""
    offered = [tuple(dict.fromkeys((*question.choices, *question.rivals))) for question in asked]
    items = [_continuations(renderer, question, choices) for question, choices in zip(asked, offered, strict=True)]
    scores = score(scorer, items, advance)
    judged = [
        Judged(question.answer, dict(zip(choices, found, strict=True)))
        for question, choices, found in zip(asked, offered, scores, strict=True)
    ]
    rights = [
        _supervised(item.prompt, item.candidates[choices.index(question.answer)])
        for question, choices, item in zip(asked, offered, items, strict=True)
    ]
    hits = [count for count, _ in likeliest(scorer, rights)]
    longest = max((len(renderer.tokenizer(question.answer)["input_ids"]) for question in asked), default=1)
    texts = answer(scorer, renderer, [_prompt(asked[index]) for index in wanted], longest + 4, advance) if wanted else []
    free = dict(zip(wanted, texts, strict=True))
    return [_Marked(*one, free.get(place)) for place, one in enumerate(zip(asked, judged, hits, strict=True))]


def _prompt(question: Question) -> tuple[Message, ...]:
    return tuple(Message(turn["role"], turn["content"]) for turn in question.prompt)


def _continuations(renderer: Renderer, question: Question, choices: Sequence[str]) -> Continuations:
    """The question with each of ``choices`` as the assistant's turn: what the turn already says belongs to the prompt."""

    def turn(text: str) -> Example:
        return renderer.example(Conversation((*_prompt(question), Message("assistant", text)), question.fact.code), "last-turn")

    rendered = [turn(question.opening + choice) for choice in choices]
    start = rendered[0].mask.index(True)
    if question.opening:
        opened = turn(question.opening).ids
        start = min(_shared(opened, one.ids) for one in rendered)
    ends = [len(one.mask) - one.mask[::-1].index(True) for one in rendered]
    return Continuations(rendered[0].ids[:start], tuple(one.ids[start:end] for one, end in zip(rendered, ends, strict=True)))


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Leading ids that two texts have in common."""
    return next((place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _supervised(prompt: tuple[int, ...], candidate: tuple[int, ...]) -> Example:
    return Example((*prompt, *candidate), (*(False for _ in prompt), *(True for _ in candidate)), "answer")


def _quantities(name: str, arm: str, marked: Sequence[_Marked], *, free: bool) -> Iterator[Quantity]:
    """The figures of one arm; facts are what is drawn, however many wordings ask for each."""
    better = "same" if arm == CONTROL else "higher"
    codes = [one.question.fact.code for one in marked]
    losses = ([one.judged.answer_loss for one in marked], [one.judged.answer_tokens for one in marked])
    shares: Mapping[str, list[bool]] = {
        NEAR: [one.judged.is_right(one.question.choices) for one in marked],
        # Trained titles are familiar, whichever term they belong to: only a model that has bound the two prefers the answer to these.
        RIVALS: [one.judged.is_right(one.question.rivals) for one in marked],
        FORCED: [one.hits == one.judged.answer_tokens for one in marked],
    }
    yield ratio(f"{name}: {LOSS}", "nats/token", "lower" if better == "higher" else better, losses, codes)
    bound = _binding(marked)
    if bound:
        yield mean(f"{name}: {BINDING}", "nats/token", better, list(bound.values()), [marked[place].question.fact.code for place in bound])
    for measured, right in shares.items():
        yield mean(f"{name}: {measured}", "share", better, right, codes)
    if free:
        yield mean(f"{name}: {FREE}", "share", better, [is_exact(one.text or "", one.question.answer) for one in marked], codes)


def _binding(marked: Sequence[_Marked]) -> dict[int, float]:
    """Place -> by how much the answer is likelier, a token, after its own question than after those of other facts of its arm.

    It is one and the same text each time, so that neither its length nor how familiar it became matters: pointwise mutual information.
    Answers that are no rival of any other question are left out.
    """
    elsewhere: defaultdict[str, list[float]] = defaultdict(list)
    for one in marked:
        for rival in one.question.rivals:
            nats, count = one.judged.scores[rival]
            elsewhere[rival].append(nats / count)
    found = {}
    for place, one in enumerate(marked):
        others = elsewhere.get(one.question.answer)
        if others:
            found[place] = sum(others) / len(others) - one.judged.answer_loss / one.judged.answer_tokens
    return found


def _style(marked: Sequence[_Marked], *, free: bool) -> Iterator[Quantity]:
    """Format, whatever the content: how likely wrong answers of the right kind are, and whether free answers have the form of a title."""
    codes = [one.question.fact.code for one in marked]
    wrong = [[one.judged.scores[choice] for choice in one.question.choices if choice != one.question.answer] for one in marked]
    parts = ([sum(nats for nats, _ in found) for found in wrong], [sum(count for _, count in found) for found in wrong])
    yield ratio(WRONG_TITLES, "nats/token", "same", parts, codes)
    if free:
        longest = max(len(one.question.answer.split()) for one in marked)
        formed = [has_form(one.text or "", longest) for one in marked]
        yield mean(TITLE_FORM, "share", "same", formed, codes)


def has_form(text: str, most_words: int) -> bool:
    """Whether ``text`` looks like a title: one line, not longer than the longest, no sentence."""
    return bool(text) and "\n" not in text and len(text.split()) <= most_words and not text.endswith(_ENDS)


def _shown(question: Question) -> tuple[str, str, str]:
    """What a sample is told by: kind, question, expected answer."""
    kind = next(name for name, members in ARMS.items() if question.fact.arm in members)
    return kind, question.prompt[-1]["content"], question.answer


def _samples(asked: Sequence[Question], count: int) -> list[int]:
    """``count`` questions, the arms in turn."""
    by_arm = [[i for i, question in enumerate(asked) if question.fact.arm == arm] for arm in ("questions", "documents", "control")]
    mixed = [arm[place] for place in range(count) for arm in by_arm if place < len(arm)]
    return mixed[:count]
