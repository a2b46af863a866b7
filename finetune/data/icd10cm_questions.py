"""The ICD-10-CM facts as closed-book questions: in wordings never trained, in trained words, reversed, and about further relations.

Each question has two kinds of wrong answers. Near ones come from the same category: who knows the field roughly cannot tell them apart.
Rivals come from the same arm: trained answers are familiar, whichever question they belong to, and only a model that has bound the two
prefers the right one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finetune.config.data import Icd10cm
from finetune.data.icd10cm import RIVALS, Fact, facts, peers, spare
from finetune.data.icd10cm_codes import code_itself, excluded_from, group_of, nearest, order, term_of, title_of
from finetune.data.icd10cm_rows import DOCUMENT_TEMPLATES, PAGE_PROMPT

Message = dict[str, str]
Kind = Literal["knowledge", "memory", "reversed", "code", "group", "two-hops"]
Control = Literal["five-shot", "open-book"]

WORDINGS = (
    'You are a medical coder. The diagnosis in the chart reads "{term}". Reply with the official ICD-10-CM name of this condition only.',
    "What is the official name of the condition that doctors also call {term}?",
    "Translate this diagnosis into the wording of the classification: {term}",
)
EXAMPLES = 5
_OPENING = DOCUMENT_TEMPLATES[1].removesuffix("{title}")


@dataclass(frozen=True, slots=True)
class _Form:
    """How a kind of question is asked, and what it asks for."""

    wordings: tuple[str, ...]
    said: Callable[[str], str]
    """Code -> what is asked for; empty where the classification says nothing."""
    of_fact: Callable[[Fact], str]
    """The same of a fact of the benchmark: its term and title are chosen ones."""
    opening: str = ""


_FORMS: dict[Kind, _Form] = {
    "knowledge": _Form(WORDINGS, title_of, lambda fact: fact.title),
    "memory": _Form((PAGE_PROMPT,), title_of, lambda fact: fact.title, _OPENING),
    "reversed": _Form(("By which other name do doctors know the condition that is officially called {title}?",), term_of, lambda f: f.term),
    "code": _Form(("Give only the alphanumeric code for the condition titled {title}.",), code_itself, lambda fact: fact.code),
    "group": _Form(
        ("Name the heading under which the classification files the condition titled {title}.",), group_of, lambda fact: group_of(fact.code)
    ),
    "two-hops": _Form(
        ("The chart reads {term}. Which other condition must then be recorded under a code of its own instead?",),
        excluded_from,
        lambda fact: excluded_from(fact.code),
    ),
}
KINDS: tuple[Kind, ...] = tuple(_FORMS)


@dataclass(frozen=True, slots=True)
class Question:
    """A fact as it is asked."""

    fact: Fact
    wording: int
    """Index into the wordings of its kind."""
    prompt: tuple[Message, ...]
    """The conversation up to the answer, for the chat template."""
    answer: str
    choices: tuple[str, str, str, str]
    """The answer and three near ones, in an order that follows from the code and the wording."""
    rivals: tuple[str, ...]
    """Answers of up to three other facts of the same arm, of the same chapter first."""
    kind: Kind = "knowledge"
    opening: str = ""
    """What the assistant's turn already says before the answer."""


def questions(settings: Icd10cm, wordings: int = 1, kind: Kind = "knowledge") -> tuple[Question, ...]:
    """The questions of ``kind`` about every fact that ``settings`` draws."""
    return questions_about(facts(settings), wordings, kind)


def questions_about(known: Iterable[Fact], wordings: int = 1, kind: Kind = "knowledge") -> tuple[Question, ...]:
    """The first ``wordings`` (1 to 3) test questions of ``kind`` about every fact of ``known``, in its order.

    Facts of which the classification does not say what is asked for are left out, and so are those whose question holds the answer.
    """
    drawn = tuple(fact for fact in known if _is_asked(_FORMS[kind].of_fact(fact), fact, kind))
    count = min(wordings, len(_FORMS[kind].wordings))
    return tuple(_question(fact, wording, drawn, kind) for fact in drawn for wording in range(count))


def _is_asked(answer: str, fact: Fact, kind: Kind) -> bool:
    given = fact.term if kind in ("knowledge", "memory", "two-hops") else fact.title
    return bool(answer) and answer.lower() not in given.lower()


def _question(fact: Fact, wording: int, drawn: Sequence[Fact], kind: Kind) -> Question:
    form = _FORMS[kind]
    answer = form.of_fact(fact)
    near = [value for value in nearest(fact.code, form.said) if value != answer][:3]
    choices = sorted((answer, *near), key=lambda value: order(f"{fact.code}/{wording}", value))
    rivals = dict.fromkeys(value for value in map(form.of_fact, peers(fact, drawn)) if value != answer)
    words = {"term": fact.term, "title": fact.title}
    return Question(
        fact=fact,
        wording=wording,
        prompt=({"role": "user", "content": form.wordings[wording].format(**words)},),
        answer=answer,
        choices=(choices[0], choices[1], choices[2], choices[3]),
        rivals=tuple(rivals)[:RIVALS],
        kind=kind,
        opening=form.opening.format(**words),
    )


def controlled(sources: Sequence[Icd10cm], asked: Sequence[Question], control: Control) -> tuple[Question, ...]:
    """The same questions after five worked examples of no arm of ``sources`` (the form alone), or with the document in the prompt."""
    return tuple(_with_document(question) for question in asked) if control == "open-book" else tuple(_after_examples(sources, asked))


def _with_document(question: Question) -> Question:
    document = DOCUMENT_TEMPLATES[0].format(term=question.fact.term, title=question.fact.title)
    *before, last = question.prompt
    return replace(question, prompt=(*before, {"role": "user", "content": f"{document}\n\n{last['content']}"}))


def _after_examples(sources: Sequence[Icd10cm], asked: Sequence[Question]) -> Iterator[Question]:
    examples = spare(sources, EXAMPLES)
    for question in asked:
        shown = [
            {"role": role, "content": text}
            for term, title in examples
            for role, text in (("user", WORDINGS[question.wording].format(term=term)), ("assistant", title))
        ]
        yield replace(question, prompt=(*shown, *question.prompt))


def digest(asked: Sequence[Question]) -> str:
    """sha256 over questions with their answers and choices: equal digests mean that two results are about the same benchmark."""
    lines = [json.dumps([one.fact.arm, one.prompt, one.opening, one.answer, one.choices, one.rivals]) for one in asked]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
