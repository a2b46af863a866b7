"""Checks of the data section: sources that cannot be meant, columns of the format, validation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from finetune.config.finding import Finding
from finetune.config.hints import nearest
from finetune.config.schema import Config, Evaluation, FileSource, HubSource, Icd10cm, KnowledgeTask, LossTask, Source
from finetune.config.tree import KeyPath

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "chat": ("messages", "tools", "system"),
    "sharegpt": ("conversations", "tools", "system"),
    "prompt-completion": ("prompt", "completion", "system"),
    "question-answer": ("question", "answer", "system"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "text": ("text",),
}
"""`format` -> the columns that a row of it may have."""


def sources(config: Config) -> list[tuple[KeyPath, Source]]:
    """Every source with its path, training first."""
    validation = config.data.validation if isinstance(config.data.validation, tuple) else ()
    rows: list[tuple[KeyPath, Source]] = [(("data", "train", index), source) for index, source in enumerate(config.data.train)]
    return rows + [(("data", "validation", index), source) for index, source in enumerate(validation)]


def columns(config: Config) -> Iterator[Finding]:
    """Names for columns that the format does not have, or two names for one column of the file."""
    for path, source in sources(config):
        if isinstance(source, FileSource | HubSource):
            yield from source_columns(source, (*path, "columns"))


def source_columns(source: FileSource | HubSource, path: KeyPath) -> Iterator[Finding]:
    """The same of one source whose `columns` stand at ``path``."""
    known = (
        tuple(dict.fromkeys(name for names in COLUMNS.values() for name in names)) if source.format == "auto" else COLUMNS[source.format]
    )
    taken: dict[str, str] = {}
    for name, theirs in source.columns.items():
        if name not in known:
            meant = nearest(name, known)
            turned = theirs in known
            fix = f"write `{theirs}: {name}`: the format's name comes first" if turned else f"columns: {', '.join(known)}"
            of = "any format" if source.format == "auto" else f"`{source.format}`"
            yield Finding(f"`{name}` is not a column of {of}", f"did you mean `{meant}`?" if meant and not turned else fix, (*path, name))
        first = taken.setdefault(theirs, name)
        if first != name:
            yield Finding(f"`{first}` and `{name}` are both read from `{theirs}`", "keep one of the two", (*path, name), (*path, first))


def facts(config: Config) -> Iterator[Finding]:
    """Built-in knowledge of which nothing would be trained."""
    for index, source in enumerate(config.data.train):
        if isinstance(source, Icd10cm) and source.document_facts + source.question_facts == 0:
            yield Finding(
                "`document_facts` and `question_facts` are both 0: no fact would be trained",
                "raise one of them",
                ("data", "train", index, "document_facts"),
                ("data", "train", index, "question_facts"),
            )


def twice(config: Config) -> Iterator[Finding]:
    """A source that is listed twice, or trained and validated on."""
    seen: dict[str, KeyPath] = {}
    for path, source in sources(config):
        first = seen.setdefault(_identity(source), path)
        if first is path:
            continue
        leaks = path[1] == "validation" and first[1] == "train"
        what = "is also trained on: its validation loss would mean nothing" if leaks else "is listed twice"
        fix = "hold rows back with `validation: {fraction: 0.02}`" if leaks else "keep one; `weight: 2` shows its rows twice an epoch"
        yield Finding(f"`{source.source}` {what}", fix, (*path, "source"), (*first, "source"))


def _identity(source: Source) -> str:
    """Equal for sources that hold the same rows, however they are read."""
    if isinstance(source, FileSource):
        return source.source if "\0" in source.source else os.path.realpath(source.source)
    return source.model_dump_json(exclude={"weight", "format", "columns"})


def validation(config: Config) -> Iterator[Finding]:
    """What watches validation loss where there is no validation data."""
    if config.data.validation is not None:
        return
    needed: list[tuple[KeyPath, str]] = []
    if config.train.early_stopping is not None:
        needed.append((("train", "early_stopping"), "early stopping watches validation loss"))
    if config.train.evaluate.every_steps is not None:
        needed.append((("train", "evaluate", "every_steps"), "`train.evaluate` measures validation loss"))
    if config.evaluation.tasks != Evaluation().tasks:  # the default lists the loss, and leaves it out where there is no data
        needed.extend(
            (("evaluation", "tasks", index, "task"), "the task `loss` needs it")
            for index, task in enumerate(config.evaluation.tasks)
            if isinstance(task, LossTask) and task.data is None
        )
    for path, why in needed:
        yield Finding(
            f"there is no validation data, and {why}", "add `validation: {fraction: 0.02}` under `data`", path, ("data", "validation")
        )


def tasks(config: Config) -> Iterator[Finding]:
    """Tasks that ask about what is not trained."""
    builtin = any(isinstance(source, Icd10cm) for source in config.data.train)
    for index, task in enumerate(config.evaluation.tasks):
        if isinstance(task, KnowledgeTask) and not builtin:
            yield Finding(
                "the task `knowledge` asks about ICD-10-CM facts, and `data.train` has no `builtin:icd10cm` source",
                "add `{source: builtin:icd10cm}` to `data.train`, or remove the task",
                ("evaluation", "tasks", index, "task"),
                ("data", "train"),
            )
