"""`finetune eval`: every task of a run for the base and the tuned model, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from finetune.config.schema import Config, ForgettingTask, Icd10cm, KnowledgeTask, LossTask, Task
from finetune.data.render import Example
from finetune.errors import ConfigError
from finetune.evaluation import forgetting, knowledge
from finetune.evaluation.comparison import Measurement, side_by_side
from finetune.evaluation.results import LOFTQ_BASE, RESULTS, Figure, Results, Sample
from finetune.evaluation.statistics import ratio
from finetune.evaluation.systems import System, base_and_tuned, directory_system
from finetune.finished import FinishedRun, load_run
from finetune.runs import RunDirectory
from finetune.sealed import write_json

Progress = Callable[[str, str, int], None]
"""(task, system, items done since the last call)"""


@dataclass(frozen=True, slots=True)
class _Measuring:
    """What every task needs."""

    config: Config
    finished: FinishedRun
    validation: tuple[Example, ...]


def evaluate(run: RunDirectory, config: Config, models: Sequence[Path] = (), progress: Progress = lambda *_: None) -> Results:
    """Measure the tasks of ``config`` for the run's base and tuned model, and for further model directories; kept in eval/results.json."""
    began = time.perf_counter()
    finished = load_run(run, config)
    systems = [*base_and_tuned(finished), *(directory_system(finished, path) for path in models)]
    _named_apart(systems)
    measuring = _Measuring(config, finished, finished.rows if finished.has_validation else ())
    figures: list[Figure] = []
    samples: list[Sample] = []
    everything: dict[str, dict[str, Measurement]] = {}
    for task in config.evaluation.tasks:
        if isinstance(task, LossTask) and not measuring.validation:
            continue
        measured = {system.name: _measure(task, system, measuring, progress) for system in systems}
        everything[task.task] = measured
        found = side_by_side(task.task, measured)
        figures += found[0]
        samples += found[1]
    names = tuple(system.name for system in systems)
    notes = (LOFTQ_BASE,) if finished.loftq else ()
    headlines = knowledge.headlines(everything)
    results = Results(str(run.path), names, tuple(figures), tuple(samples), time.perf_counter() - began, notes, headlines)
    run.evaluations.mkdir(exist_ok=True)
    write_json(run.evaluations / RESULTS, results.as_dict())
    return results


def _named_apart(systems: Sequence[System]) -> None:
    """ConfigError where two models would share a column."""
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two models are called {name!r}", where="MODEL", fix="rename a directory, or evaluate them one after the other"
            )


def _measure(task: Task, system: System, measuring: _Measuring, progress: Progress) -> Measurement:
    def advance(count: int) -> None:
        progress(task.task, system.name, count)

    renderer = measuring.finished.renderer
    with system.using():
        match task:
            case LossTask():
                rows = range(len(measuring.validation))
                totals = dict(system.scorer.losses(measuring.validation, advance))
                parts = ([float(totals[row].sum()) for row in rows], [len(totals[row]) for row in rows])
                return Measurement(
                    (
                        ratio("validation: loss", "nats/token", "lower", parts, rows),
                        ratio("validation: perplexity", "", "lower", parts, rows, "exp"),
                    )
                )
            case KnowledgeTask():
                asked = [question for source in _facts(measuring.config) for question in knowledge.ask(source, task.questions_per_fact)]
                samples = measuring.config.evaluation.samples
                return knowledge.measure(system.scorer, renderer, asked, generate=task.generate, samples=samples, advance=advance)
            case ForgettingTask():
                return forgetting.measure(system.scorer, renderer, advance)
        assert_never(task)


def _facts(config: Config) -> list[Icd10cm]:
    return [source for source in config.data.train if isinstance(source, Icd10cm)]
