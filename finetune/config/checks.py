"""Combinations of values that cannot work, found before anything is downloaded or loaded.

Each check reads a whole configuration and yields what is wrong, with the paths that it looked at: the first is where the error points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from finetune.config import group_checks, value_checks
from finetune.config.finding import Finding
from finetune.config.schema import Config, Evaluation, Full, Icd10cm, KnowledgeTask, Lora, LossTask, NoQuantization
from finetune.config.tree import KeyPath


def check(config: Config) -> list[Finding]:
    """Everything that cannot work."""
    return [finding for one in _CHECKS for finding in one(config)]


def _loftq(config: Config) -> Iterator[Finding]:
    if not isinstance(config.tuning, Lora) or not isinstance(config.quantization, NoQuantization):
        return
    if config.tuning.init.method == "loftq":
        yield Finding(
            "`tuning.init` is LoftQ, which corrects the error of a quantized base, and the base is not quantized",
            "set `quantization: {method: nf4}`, or remove `tuning.init`",
            ("tuning", "init", "method"),
            ("quantization", "method"),
        )


def _orthogonal(config: Config) -> Iterator[Finding]:
    tuning = config.tuning
    if isinstance(tuning, Lora) and tuning.init.method == "orthogonal" and tuning.rank % 2:
        yield Finding(
            f"orthogonal initialization halves the rank, and {tuning.rank} is odd",
            f"set `rank: {tuning.rank + 1}`",
            ("tuning", "rank"),
            ("tuning", "init", "method"),
        )


def _full(config: Config) -> Iterator[Finding]:
    if not isinstance(config.tuning, Full):
        return
    if not isinstance(config.quantization, NoQuantization):
        yield Finding(
            f"`tuning.method: full` trains every weight, and {config.quantization.method} weights cannot be trained",
            "set `tuning: {method: lora}`, or `quantization: {method: none}`",
            ("tuning", "method"),
            ("quantization", "method"),
        )
    if config.optimizer.lora_plus_ratio != 1:
        yield Finding(
            "`optimizer.lora_plus_ratio` sets the rate of B over that of A, and full tuning has neither",
            "remove it, or set `tuning: {method: lora}`",
            ("optimizer", "lora_plus_ratio"),
            ("tuning", "method"),
        )


def _warmup(config: Config) -> Iterator[Finding]:
    schedule, most = config.schedule, config.train.max_steps
    if schedule.warmup_ratio is not None and schedule.warmup_steps is not None:
        yield Finding(
            "`schedule` has both `warmup_ratio` and `warmup_steps`",
            "keep one of the two (a preset's value is removed with `null`)",
            ("schedule", "warmup_steps"),
            ("schedule", "warmup_ratio"),
        )
    if most is not None and schedule.warmup_steps is not None and schedule.warmup_steps >= most:
        yield Finding(
            f"the run ends after {most} steps, inside the warm-up of {schedule.warmup_steps}",
            "lower `warmup_steps`, or use `warmup_ratio: 0.03`",
            ("schedule", "warmup_steps"),
            ("train", "max_steps"),
        )
    if schedule.warmup_ratio == 1:
        yield Finding("the whole run would be warm-up", "0.03 to 0.1 is usual", ("schedule", "warmup_ratio"))


def _decay(config: Config) -> Iterator[Finding]:
    if config.schedule.method == "constant" and config.schedule.min_lr_ratio:
        yield Finding(
            "a constant schedule never reaches `min_lr_ratio`",
            "remove it, or set `method: cosine`",
            ("schedule", "min_lr_ratio"),
            ("schedule", "method"),
        )


def _facts(config: Config) -> Iterator[Finding]:
    for index, source in enumerate(config.data.train):
        if isinstance(source, Icd10cm) and source.document_facts + source.question_facts == 0:
            yield Finding(
                "`document_facts` and `question_facts` are both 0: no fact would be trained",
                "raise one of them",
                ("data", "train", index, "document_facts"),
                ("data", "train", index, "question_facts"),
            )


def _sources_twice(config: Config) -> Iterator[Finding]:
    validation = config.data.validation if isinstance(config.data.validation, tuple) else ()
    seen: dict[str, KeyPath] = {}
    rows = [(("data", "train", index), source) for index, source in enumerate(config.data.train)]
    rows += [(("data", "validation", index), source) for index, source in enumerate(validation)]
    for path, source in rows:
        name = source.source if not isinstance(source, Icd10cm) else source.model_dump_json(exclude={"weight"})
        first = seen.setdefault(name, path)
        if first is path:
            continue
        leaks = path[1] == "validation" and first[1] == "train"
        what = "is also trained on: its validation loss would mean nothing" if leaks else "is listed twice"
        fix = "hold rows back with `validation: {fraction: 0.02}`" if leaks else "keep one; `weight: 2` shows its rows twice an epoch"
        yield Finding(f"`{source.source}` {what}", fix, (*path, "source"), (*first, "source"))


def _validation(config: Config) -> Iterator[Finding]:
    if config.data.validation is not None:
        return
    needed: list[tuple[KeyPath, str]] = []
    if config.train.early_stopping is not None:
        needed.append((("train", "early_stopping"), "early stopping watches validation loss"))
    if config.train.evaluate.every_steps is not None:
        needed.append((("train", "evaluate", "every_steps"), "`train.evaluate` measures validation loss"))
    if config.evaluation.tasks != Evaluation().tasks:  # the default lists the loss, and leaves it out where there is no data
        tasks = enumerate(config.evaluation.tasks)
        needed.extend(
            (("evaluation", "tasks", index, "task"), "the task `loss` needs it") for index, task in tasks if isinstance(task, LossTask)
        )
    for path, why in needed:
        yield Finding(
            f"there is no validation data, and {why}", "add `validation: {fraction: 0.02}` under `data`", path, ("data", "validation")
        )


def _tasks(config: Config) -> Iterator[Finding]:
    seen: set[str] = set()
    builtin = any(isinstance(source, Icd10cm) for source in config.data.train)
    for index, task in enumerate(config.evaluation.tasks):
        path: KeyPath = ("evaluation", "tasks", index, "task")
        if task.task in seen:
            yield Finding(f"the task `{task.task}` is listed twice", "keep one of the two", path)
        seen.add(task.task)
        if isinstance(task, KnowledgeTask) and not builtin:
            yield Finding(
                "the task `knowledge` asks about ICD-10-CM facts, and `data.train` has no `builtin:icd10cm` source",
                "add `{source: builtin:icd10cm}` to `data.train`, or remove the task",
                path,
                ("data", "train"),
            )


_CHECKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    value_checks.names,
    value_checks.learning_rates,
    value_checks.targets,
    _loftq,
    _orthogonal,
    _full,
    group_checks.groups,
    _warmup,
    _decay,
    _facts,
    _sources_twice,
    _validation,
    _tasks,
)
