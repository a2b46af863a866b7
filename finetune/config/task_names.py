"""What the tasks of an evaluation are called."""

from __future__ import annotations

from finetune.config.schema import ForgettingTask, KnowledgeTask, LossTask, Task


def task_name(task: Task) -> str:
    """The name that its figures bear, by which tasks are told apart."""
    if isinstance(task, KnowledgeTask | ForgettingTask):
        return task.task
    if task.name is not None:
        return task.name
    return "validation" if isinstance(task, LossTask) and task.data is None else task.task
