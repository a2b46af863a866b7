"""Checks of what an evaluation measures: names that tasks share, and settings of a task that nothing would read."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetune.config.data_checks import source_columns
from finetune.config.finding import Finding
from finetune.config.schema import ChoicesTask, Config, ForgettingTask, GenerateTask, KnowledgeTask, LossTask
from finetune.config.task_names import task_name
from finetune.config.tree import KeyPath

_QUESTION = ("question", "choices", "answer")


def evaluation_tasks(config: Config) -> Iterator[Finding]:
    """Tasks of one name, and settings of a task that would not be read."""
    seen: dict[str, KeyPath] = {}
    for index, task in enumerate(config.evaluation.tasks):
        path: KeyPath = ("evaluation", "tasks", index)
        first = seen.setdefault(task_name(task), (*path, "task"))
        if first != (*path, "task"):
            fix = (
                "keep one of the two" if isinstance(task, KnowledgeTask | ForgettingTask) else "keep one of the two, or give each a `name`"
            )
            yield Finding(f"two tasks are called `{task_name(task)}`", fix, (*path, "task"), first)
        if isinstance(task, LossTask | GenerateTask | ChoicesTask) and task.data is not None:
            yield from _task_rows(task, path)
        if isinstance(task, GenerateTask):
            yield from _generation(task, path)


def _task_rows(task: LossTask | GenerateTask | ChoicesTask, path: KeyPath) -> Iterator[Finding]:
    assert task.data is not None
    if task.data.weight != 1.0:
        yield Finding("`weight` has no meaning where rows are measured", "leave it out", (*path, "data", "weight"))
    if not isinstance(task, ChoicesTask):
        yield from source_columns(task.data, (*path, "data", "columns"))
        return
    if task.data.format != "auto":
        yield Finding("the task `choices` has a form of its own", "leave `format` out", (*path, "data", "format"))
    for name in task.data.columns:
        if name not in _QUESTION:
            place: KeyPath = (*path, "data", "columns", name)
            yield Finding(f"`{name}` is no column of the task `choices`", f"columns: {', '.join(_QUESTION)}", place)


def _generation(task: GenerateTask, path: KeyPath) -> Iterator[Finding]:
    wanted = "regex" in task.metrics
    if wanted != (task.pattern is not None):
        what = "the metric `regex` needs a `pattern`" if wanted else "`pattern` is read by the metric `regex` alone"
        fix = "add `pattern:`" if wanted else "add `regex` to `metrics`, or remove the pattern"
        yield Finding(what, fix, (*path, "metrics" if wanted else "pattern"))
    if task.pattern is not None:
        try:
            re.compile(task.pattern)
        except re.error as error:
            yield Finding(f"`pattern` is no regular expression: {error}", "mend it", (*path, "pattern"))
    if not task.temperature and task.top_p != 1.0:
        yield Finding("`top_p` has no effect on greedy answers", "set `temperature`, or remove `top_p`", (*path, "top_p"))
