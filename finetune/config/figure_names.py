"""What figures are called, so that a name is held to those that an evaluation gives before anything is trained or measured."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetune.config.evaluation import ChoicesTask, ForgettingTask, GenerateTask, HarnessTask, KnowledgeTask, LossTask, Task
from finetune.config.schema import Config
from finetune.config.task_names import task_name

VALIDATION_LOSS = "validation loss"
"""The least that a run saw while it trained."""

TRAINED, ASKED, READ, CONTROL = (
    "all trained facts",
    "trained as documents and questions",
    "trained as documents only",
    "never trained (control)",
)
"""The arms of facts."""
LABELS: dict[str, str] = {
    "knowledge": "",
    "memory": "in trained words",
    "reversed": "reversed",
    "code": "the code",
    "group": "the group",
    "two-hops": "two hops",
    "five-shot": "after five examples",
    "open-book": "with the document",
}
"""What stands after the arm, by what a task lists under `asks` and `controls`."""
OF_SECTIONS = (TRAINED, CONTROL)
"""Arms of all but the main questions, where the table would grow too long."""
LOSS, BINDING, NEAR, RIVALS, FORCED, FREE = (
    "answer loss",
    "binding to its question",
    "choice of four, near titles",
    "choice of four, titles of the arm",
    "exact match, teacher-forced",
    "exact match",
)
"""What is measured of each arm; the last one needs free answers."""
WRONG_TITLES = "style alone: loss of wrong titles"
TITLE_FORM = "style alone: free answers in the form of a title"

STYLE, SUBSTANCE, GAP, EFFICIENCY = "style", "substance", "extraction gap", "efficiency"
"""Conclusions."""
HEADLINES = (LOSS, BINDING, RIVALS)
"""The figures that conclusions are drawn from. Training makes titles familiar, whichever term they stand beside, and that alone lowers the
loss of answers and beats titles never read: only the last two tell whether term and title were bound."""

GENERAL_TEXT = "general text: loss"
GENERAL_QUESTIONS = "general questions: four-way choice"
METRICS = {
    "exact-match": "exact match",
    "token-f1": "token F1",
    "rouge-l": "ROUGE-L",
    "chrf": "chrF",
    "regex": "pattern found",
    "json": "valid JSON",
}
"""Of free answers, by what a task lists under `metrics`."""
_CHANCE = re.compile(r"\(chance [0-9]+%\)")
_ANY_CHANCE = "(chance N%)"
"""Stands for the share that rows decide."""


def figure_names(config: Config) -> frozenset[str] | None:
    """Every figure and conclusion that a run of ``config`` and its evaluation can have, in `general_name`'s form.

    None where that cannot be told: the tasks of lm-evaluation-harness name their own. Whether each is there depends on the rows, too.
    """
    tasks = config.evaluation.tasks
    if any(isinstance(task, HarnessTask) for task in tasks):
        return None
    found = {name for task in tasks for name in _of_task(task, config)}
    if f"{TRAINED}: {LOSS}" in found and GENERAL_TEXT in found:
        found.add(f"{EFFICIENCY}: {LOSS}")
    return frozenset(found | trained_names(config))


def trained_names(config: Config) -> set[str]:
    """The figures that training alone gives."""
    return set() if config.data.validation is None else {VALIDATION_LOSS}


def general_name(name: str) -> str:
    """``name`` without the share that guessing gives, which only the rows tell."""
    return _CHANCE.sub(_ANY_CHANCE, name)


def _of_task(task: Task, config: Config) -> Iterator[str]:
    name = task_name(task)
    match task:
        case LossTask():
            if task.data is not None or config.data.validation is not None:
                yield from (f"{name}: loss", f"{name}: perplexity")
        case GenerateTask():
            yield from (f"{name}: {METRICS[metric]}" for metric in task.metrics)
            yield f"{name}: ended by itself"
        case ChoicesTask():
            yield from (f"{name}: {measured} {_ANY_CHANCE}" for measured in ("accuracy", "accuracy, length-normalized"))
            yield f"{name}: loss of the right answer"
        case KnowledgeTask():
            yield from _of_knowledge(task)
        case ForgettingTask():
            yield from (GENERAL_TEXT, GENERAL_QUESTIONS)


def _of_knowledge(task: KnowledgeTask) -> Iterator[str]:
    for place, asked in enumerate((*task.asks, *task.controls)):
        label, free = LABELS[asked], task.generate and place == 0
        for arm in OF_SECTIONS if label else (TRAINED, ASKED, READ, CONTROL):
            group = f"{arm}, {label}" if label else arm
            yield from (f"{group}: {measured}" for measured in (LOSS, BINDING, NEAR, RIVALS, FORCED, *((FREE,) if free else ())))
    yield from (WRONG_TITLES, *((TITLE_FORM,) if task.generate else ()))
    if "knowledge" in task.asks:
        yield from (f"{conclusion}: {measured}" for conclusion in (STYLE, SUBSTANCE, GAP) for measured in HEADLINES)
