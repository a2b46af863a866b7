"""The verbs of finetune for programs and for the command line.

Heavy libraries are imported inside the functions, so that `finetune --help` and `finetune config check` answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.load import Loaded, load_config
from finetune.config.shipped import find_config
from finetune.hardware import prepare_process
from finetune.runs import RunDirectory, open_run

if TYPE_CHECKING:
    from finetune.config.schema import Config
    from finetune.evaluation.results import Results
    from finetune.training.metrics import Observer

__all__ = ["evaluate", "find_config", "launch", "load_config", "merge", "prepare_data", "read_run_config", "report", "train"]


def train(config: Config, observer: Observer | None = None, *, resume: bool = False) -> RunDirectory:
    """Train as ``config`` says; returns the finished run directory."""
    prepare_process()
    from finetune.training.metrics import ignore
    from finetune.training.train import train as run_training

    return run_training(config, observer or ignore, resume=resume)


def launch(arguments: Sequence[str], devices: int | None) -> int | None:
    """Start one worker a device where more than one is wanted; returns their exit code, or None where this process is to train alone."""
    prepare_process()
    from finetune.training.launch import launch as start_workers

    return start_workers(arguments, devices)


def read_run_config(run: RunDirectory, overrides: Sequence[str] = ()) -> Loaded:
    """The resolved configuration that a run was trained with."""
    return load_config(run.config, overrides)


def evaluate(
    run: Path, models: Sequence[Path] = (), overrides: Sequence[str] = (), progress: Callable[[str, str, int], None] = lambda *_: None
) -> Results:
    """Measure a finished run against its base, and further model directories on the same questions."""
    prepare_process()
    from finetune.evaluation.evaluate import evaluate as measure

    found = open_run(run)
    return measure(found, read_run_config(found, overrides).config, models, progress)


def report(run: Path) -> Path:
    """Write the page of a run from its files; returns the path of report.html."""
    from finetune.reporting.html import write_report

    return write_report(open_run(run))
