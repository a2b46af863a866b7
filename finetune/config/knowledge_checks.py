"""Checks of the knowledge benchmark: questions about what no source teaches, and a control that cannot be made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from finetune.config.data import Relation
from finetune.config.finding import Finding
from finetune.config.schema import Config, Icd10cm, KnowledgeTask
from finetune.config.tree import KeyPath

_TAUGHT_BY: Mapping[str, tuple[Relation, ...]] = {"code": ("title-code", "code-title"), "group": ("hierarchy",), "two-hops": ("excludes",)}


def taught_by(asked: str) -> tuple[Relation, ...]:
    """The `relations` of a source that teach what `asks` of a knowledge task names."""
    return _TAUGHT_BY.get(asked, ("inclusion-term",))


def knowledge(config: Config) -> Iterator[Finding]:
    """Untaught questions, anything listed twice, and answers of a single fact to be shuffled."""
    sources = {index: source for index, source in enumerate(config.data.train) if isinstance(source, Icd10cm)}
    for index, source in sources.items():
        yield from _twice(source.relations, ("data", "train", index, "relations"))
        if source.answers == "shuffled" and source.document_facts + source.question_facts == 1:
            place: KeyPath = ("data", "train", index, "answers")
            yield Finding("the answers of one fact cannot be shuffled", "raise `document_facts` or `question_facts`", place)
    taught: set[str] = {relation for source in sources.values() for relation in source.relations}
    for index, task in enumerate(config.evaluation.tasks):
        if isinstance(task, KnowledgeTask):
            path: KeyPath = ("evaluation", "tasks", index)
            yield from _twice(task.asks, (*path, "asks"))
            yield from _twice(task.controls, (*path, "controls"))
            yield from _untaught(task, taught, (*path, "asks")) if sources else ()


def _twice(named: tuple[str, ...], path: KeyPath) -> Iterator[Finding]:
    for index, name in enumerate(named):
        if name in named[:index]:
            yield Finding(f"`{name}` is listed twice", "keep one of the two", (*path, index))


def _untaught(task: KnowledgeTask, taught: set[str], path: KeyPath) -> Iterator[Finding]:
    for index, asked in enumerate(task.asks):
        teachers = taught_by(asked)
        if not taught.intersection(teachers):
            fix = f"add `{teachers[0]}` to `relations` of the `builtin:icd10cm` source, or do not ask for it"
            yield Finding(f"`{asked}` is asked, and no source teaches it", fix, (*path, index), ("data", "train"))
