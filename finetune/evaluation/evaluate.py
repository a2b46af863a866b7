"""`finetune eval`: every task for every target and for what it was trained from, side by side.

Targets are loaded one after the other, so that memory is that of the largest; of rows, only what a figure needs of each is kept.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, assert_never

import torch

from finetune.config.schema import (
    ChoicesTask,
    Evaluation,
    ForgettingTask,
    GenerateTask,
    HarnessTask,
    KnowledgeTask,
    LossTask,
    Task,
)
from finetune.data.render import Renderer
from finetune.errors import ConfigError
from finetune.evaluation import choices_task, forgetting, generate_task, harness, knowledge, loss_task
from finetune.evaluation.comparison import Measurement, alike, side_by_side
from finetune.evaluation.conclusions import headlines
from finetune.evaluation.items import Measured, write_items
from finetune.evaluation.materials import Materials, materials_of, trained_on_others
from finetune.evaluation.measured_rows import identity
from finetune.evaluation.request import Request
from finetune.evaluation.results import Figure, Results, Sample
from finetune.evaluation.systems import Opened, System, model_directory, open_target
from finetune.evaluation.targets import column_names, require_apart
from finetune.hardware import environment
from finetune.sealed import write_json

Progress = Callable[[str, str, int], None]
"""(task, system, items done since the last call)"""

BASE = "base"
"""Column of the model before training."""


@dataclass(slots=True)
class _Gathered:
    """What was found so far."""

    measured: dict[str, dict[str, Measurement]]
    """Task name -> column -> measurement."""
    records: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bases: dict[str, str] = field(default_factory=dict)
    """Identity of a base -> its column."""
    trained: dict[str, str] = field(default_factory=dict)
    """Column of each trained target -> that of its base."""
    tokenizers: set[str] = field(default_factory=set)

    def systems(self, request: Request) -> tuple[str, ...]:
        """The columns: bases, then targets."""
        return (*self.bases.values(), *column_names(request.targets).values())


def evaluate(request: Request, progress: Progress = lambda *_: None) -> Results:
    """Measure every task for every target and its base; kept in ``request.destination`` with all that is needed to repeat it."""
    began = time.perf_counter()
    columns = column_names(request.targets)
    trained = [BASE] if any(target.kind != "model" for target in request.targets) else []
    require_apart([*trained, *columns.values()])
    tasks, materials, notes = _prepared(request)
    work = _Work(tasks, materials, _identities(tasks), request.settings, progress)
    for target in request.targets:
        if target.kind == "model":
            model_directory(target)  # a mistyped one is told before the first model is measured
    gathered = _Gathered({name: {} for name in tasks}, notes=notes)
    for target in request.targets:
        opened = open_target(target, request.configs.get(target.word), request.settings, request.base)
        _measure_target(columns[target.word], opened, work, gathered)
        del opened
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    seconds = time.perf_counter() - began
    names = gathered.systems(request)
    measured = {name: alike(name, {column: gathered.measured[name][column] for column in names}, gathered.notes) for name in tasks}
    results = _results(request, work, gathered, measured, seconds)
    results.record["items"] = write_items(request.destination, measured)  # only once nothing else can fail
    write_json(request.destination, results.as_dict())
    return results


# --- before anything is loaded -------------------------------------------------------------------------------------------------------


def _prepared(request: Request) -> tuple[dict[str, Task], Materials, list[str]]:
    """The tasks that can be measured, what they need of runs, and notes on those left out; ConfigError where one asked for cannot be."""
    materials = materials_of(request)
    tasks, notes = {}, []
    for name, task in request.tasks.items():
        if isinstance(task, LossTask) and task.data is None and not materials.validation:
            if request.settings.tasks != Evaluation().tasks:
                raise ConfigError(
                    "the task `loss` has no rows: no run with validation rows is among the targets",
                    where="evaluation.tasks",
                    fix="name its rows with `data: {source: FILE}`, or name the run too",
                )
            notes.append("validation loss is not measured: no run with validation rows is among the targets")
            continue
        if isinstance(task, KnowledgeTask) and not materials.facts:
            raise ConfigError(
                "the task `knowledge` asks about the facts of a run, and no run that was trained on `builtin:icd10cm` is among the targets",
                where="evaluation.tasks",
                fix="name the run too, or leave the task out",
            )
        if isinstance(task, GenerateTask):
            generate_task.metrics_of(task)  # a missing library is told before the first model is loaded
        if isinstance(task, HarnessTask):
            harness.require_tasks(task)
        tasks[name] = task
    return tasks, materials, notes


def _identities(tasks: Mapping[str, Task]) -> dict[str, Any]:
    """What the rows of each task are; DataError for a file that is not there, before the first model is loaded."""
    with_data = (LossTask, GenerateTask, ChoicesTask)
    return {name: identity(task.data) for name, task in tasks.items() if isinstance(task, with_data) and task.data}


# --- measuring -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    """What is done with each model."""

    tasks: Mapping[str, Task]
    materials: Materials
    data: Mapping[str, Any]
    """Task name -> what its rows are, where it has rows of its own."""
    settings: Evaluation
    progress: Progress


def _measure_target(column: str, opened: Opened, work: _Work, gathered: _Gathered) -> None:
    """The target, and its base where no target before has the same one."""
    gathered.notes += [note for note in opened.notes if note not in gathered.notes]
    gathered.records[column] = opened.record
    gathered.tokenizers.add(opened.tuned.renderer.tokenizer_hash)
    if opened.base is not None and opened.base_identity not in gathered.bases:
        base_column = f"{BASE} of {column}" if gathered.bases else BASE
        gathered.bases[opened.base_identity] = base_column
        gathered.records[base_column] = {"kind": "base", "of": column}
        _measure_system(base_column, opened.base(), work, gathered)
    if opened.base is not None:
        gathered.trained[column] = gathered.bases[opened.base_identity]
    _measure_system(column, opened.tuned, work, gathered)


def _measure_system(column: str, system: System, work: _Work, gathered: _Gathered) -> None:
    with system.using():
        for name, task in work.tasks.items():
            gathered.measured[name][column] = _measure(name, task, system, work, column)


def _measure(name: str, task: Task, system: System, work: _Work, column: str) -> Measurement:
    def advance(count: int) -> None:
        work.progress(name, column, count)

    scorer, renderer = system.scorer, system.renderer
    match task:
        case LossTask():
            return _loss(name, task, system, work, (column, advance))
        case GenerateTask():
            return generate_task.measure(scorer, renderer, name, task, samples=work.settings.samples, advance=advance)
        case ChoicesTask():
            return choices_task.measure(scorer, renderer, name, task, advance)
        case KnowledgeTask():
            asked = knowledge.sections(work.materials.facts, task)
            return knowledge.measure(scorer, renderer, asked, generate=task.generate, samples=work.settings.samples, advance=advance)
        case ForgettingTask():
            return forgetting.measure(scorer, renderer, advance)
        case HarnessTask():
            return harness.measure(scorer, renderer, name, task, advance)
    assert_never(task)


def _loss(name: str, task: LossTask, system: System, work: _Work, watched: tuple[str, Callable[[int], None]]) -> Measurement:
    column, advance = watched
    if task.data is not None:
        return loss_task.measure_rows(system.scorer, system.renderer, name, task, advance)
    _require_tokenizer(system.renderer, work.materials, column)
    return loss_task.measure_validation(system.scorer, name, work.materials.validation, advance)


def _require_tokenizer(renderer: Renderer, materials: Materials, column: str) -> None:
    if renderer.tokenizer_hash != materials.tokenizer:
        raise ConfigError(
            f"{column} has another tokenizer than the run whose validation rows are measured",
            where="evaluation.tasks: loss",
            fix="name the rows as a file, `{task: loss, data: {source: FILE}}`, so that each model reads them with its own",
        )


# --- afterwards ----------------------------------------------------------------------------------------------------------------------


def _results(request: Request, work: _Work, gathered: _Gathered, measured: Measured, seconds: float) -> Results:
    if len(gathered.tokenizers) > 1:
        gathered.notes.append("the models have different tokenizers: nats a token of one cannot be compared with those of another")
    figures: list[Figure] = []
    samples: list[Sample] = []
    for name, task in work.tasks.items():
        found = _joined(name, task, measured[name], gathered.trained)
        figures += found[0]
        samples += found[1]
    concluded = headlines({task.task: measured[name] for name, task in work.tasks.items()}, _judged(request, work.tasks, gathered))
    return Results(
        str(request.targets[0].path if request.targets[0].kind == "run" else request.targets[0].word),
        gathered.systems(request),
        tuple(figures),
        tuple(samples),
        seconds,
        tuple(gathered.notes),
        concluded,
        bases=gathered.trained,
        record=_record(request, work, gathered.records),
    )


def _judged(request: Request, tasks: Mapping[str, Task], gathered: _Gathered) -> dict[str, str]:
    """The trained columns of which conclusions can be drawn, with their bases; notes on the others, and on bases apart."""
    found = dict(gathered.trained)
    apart = [f"of {column} from {base}" for column, base in found.items() if base != BASE]
    if apart:
        gathered.notes.append(f"each trained model is compared with its own base: changes {', '.join(apart)}, all others from {BASE}")
    for task in tasks.values():
        if isinstance(task, KnowledgeTask):
            others, notes = trained_on_others(request, task)
            found = {column: base for column, base in found.items() if column not in others}
            gathered.notes += notes
    return found


def _joined(name: str, task: Task, measured: Mapping[str, Measurement], bases: Mapping[str, str]) -> tuple[list[Figure], list[Sample]]:
    try:
        return side_by_side(task.task, measured, bases)
    except ValueError as error:
        raise ConfigError(
            f"{name}: the models were not measured on the same items ({error})",
            where="evaluation.tasks",
            fix="their tokenizers cut the rows differently: measure the models one after the other",
        ) from error


def _record(request: Request, work: _Work, systems: dict[str, Any]) -> dict[str, Any]:
    """All that is needed to measure the same again."""
    asked = {name: knowledge.digests(work.materials.facts, task) for name, task in work.tasks.items() if isinstance(task, KnowledgeTask)}
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "targets": [target.word for target in request.targets],
        "kept": str(request.destination),
        "base": request.base,
        "systems": systems,
        "evaluation": request.settings.model_dump(mode="json"),
        "data": dict(work.data),
        "questions": asked,
        "validation": work.materials.record,
        **environment(),
    }
