"""Multiple choice on rows of the user's: a question, its choices, and which of them is right.

The figures are those of lm-evaluation-harness: `accuracy` takes the choice with the least loss summed over its tokens, the
length-normalized one the least loss a character. Neither counts the token that ends the turn, which the benchmark of knowledge does.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.config.schema import ChoicesTask
from finetune.data.formats import Message
from finetune.data.messages import checked_text
from finetune.data.records import Conversation, Row
from finetune.data.render import Renderer
from finetune.errors import DataError, Problem
from finetune.evaluation.choices import Continuations, Scores, score
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.measured_rows import row_windows
from finetune.evaluation.statistics import mean, ratio
from finetune.scoring import Scorer

_COLUMNS = ("question", "choices", "answer")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Question:
    """One row."""

    question: str
    choices: tuple[str, ...]
    right: int
    """Number of the right one, from 0."""
    where: str


@dataclass(slots=True)
class _Found:
    """One entry a question: all that is kept of it."""

    accuracy: array[int] = field(default_factory=lambda: array("b"))
    normalized: array[int] = field(default_factory=lambda: array("b"))
    nats: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[int] = field(default_factory=lambda: array("q"))
    chance: array[float] = field(default_factory=lambda: array("d"))


def measure(scorer: Scorer, renderer: Renderer, name: str, task: ChoicesTask, advance: Callable[[int], None]) -> Measurement:
    """Accuracy, accuracy by loss a character, and the loss of right answers; DataError where a row cannot be asked."""
    found = _Found()
    for questions in question_windows(task):
        asked = [continuations(renderer, question, chat=task.style == "chat") for question in questions]
        for question, scores in zip(questions, score(scorer, asked, advance), strict=True):
            _add(found, question, scores)
    chance = f"chance {sum(found.chance) / len(found.chance):.0%}"
    rows = range(len(found.nats))
    return Measurement(
        (
            mean(f"{name}: accuracy ({chance})", "share", "higher", found.accuracy, rows),
            mean(f"{name}: accuracy, length-normalized ({chance})", "share", "higher", found.normalized, rows),
            ratio(f"{name}: loss of the right answer", "nats/token", "lower", (found.nats, found.tokens), rows),
        )
    )


def _add(found: _Found, question: Question, scores: Scores) -> None:
    nats = np.array([total for total, _ in scores])
    characters = np.array([len(choice) for choice in question.choices])
    found.accuracy.append(int(nats.argmin()) == question.right)
    found.normalized.append(int((nats / characters).argmin()) == question.right)
    found.nats.append(scores[question.right][0])
    found.tokens.append(scores[question.right][1])
    found.chance.append(1 / len(question.choices))


def continuations(renderer: Renderer, question: Question, *, chat: bool) -> Continuations:
    """The question as a prompt and each choice as what follows: an assistant's turn without its end, or a space and the choice."""
    if chat:
        rendered = [_turn(renderer, question, choice) for choice in question.choices]
        prompts, candidates = {prompt for prompt, _ in rendered}, tuple(candidate for _, candidate in rendered)
    else:
        prompts, candidates = {_encoded(renderer, question.question.rstrip())}, _after(renderer, question)
    if len(prompts) != 1 or not all((*prompts, *candidates)):
        raise DataError("question and choices do not part into tokens of their own", where=question.where, fix="mend or remove the row")
    return Continuations(prompts.pop(), candidates)


def _turn(renderer: Renderer, question: Question, choice: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the prompt, and of ``choice`` as the turn that answers it."""
    turns = (Message("user", question.question), Message("assistant", choice))
    example = renderer.example(Conversation(turns, question.where), "last-turn")
    start, end = example.mask.index(True), len(example.mask) - example.mask[::-1].index(True)
    if example.ids[end - 1] == renderer.end_of_turn:
        end -= 1
    return example.ids[:start], example.ids[start:end]


def _after(renderer: Renderer, question: Question) -> tuple[tuple[int, ...], ...]:
    """Ids of each choice: those of the whole text behind as many as the question alone has, as lm-evaluation-harness cuts them."""
    start = len(_encoded(renderer, question.question.rstrip()))  # spaces belong to the word that follows
    return tuple(_encoded(renderer, f"{question.question} {choice}")[start:] for choice in question.choices)


def _encoded(renderer: Renderer, text: str) -> tuple[int, ...]:
    return tuple(renderer.tokenizer(text)["input_ids"])


# --- rows ----------------------------------------------------------------------------------------------------------------------------


def question_windows(task: ChoicesTask) -> Iterator[list[Question]]:
    """The rows of ``task`` in windows; DataError with every bad row of the first window that has one."""
    for rows in row_windows(task.data):
        questions: list[Question] = []
        problems: list[Problem] = []
        for row in rows:
            try:
                questions.append(_question(row, task.data.columns))
            except DataError as error:
                problems.extend(error.problems)
        if problems:
            raise DataError.from_problems(problems)
        yield questions


def _question(row: Row, columns: Mapping[str, str]) -> Question:
    values = {}
    for name in _COLUMNS:
        theirs = columns.get(name, name)
        if row.values.get(theirs) is None:
            fix = "map it with `columns`, such as `columns: {answer: label}`"
            raise DataError(f"the row lacks {theirs!r}: a question needs `question`, `choices` and `answer`", where=row.where, fix=fix)
        values[name] = row.values[theirs]
    choices = values["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError("`choices` must be a list of at least two texts", where=row.where, fix='write ["first", "second"]')
    if len(set(choices)) < len(choices):
        raise DataError("two choices are the same", where=row.where, fix="remove one of them")
    question = values["question"]
    if not isinstance(question, str) or not question.strip():
        raise DataError("`question` must be text that is not empty", where=row.where, fix="write it as a string")
    for text in (question, *choices):
        checked_text(text, "question", row.where)
    return Question(question, tuple(choices), _right(values["answer"], choices, row.where), row.where)


def _right(answer: Any, choices: list[str], where: str) -> int:
    """Number of the right choice: stated as its text, as a number from 0, or as a letter from A."""
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    number = _LETTERS.find(answer) if isinstance(answer, str) and len(answer) == 1 else answer
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(choices):
        return number
    raise DataError(
        f"`answer` is {answer!r}, which is none of the {len(choices)} choices",
        where=where,
        fix="write the text of the right one, its number from 0, or its letter from A",
    )
