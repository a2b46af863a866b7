"""What is to be measured, put together from the command line and the runs' configurations before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from finetune.config.evaluation_file import load_evaluation
from finetune.config.load import load_config
from finetune.config.schema import Config, Evaluation, Task
from finetune.config.task_names import task_name
from finetune.errors import ConfigError
from finetune.evaluation.results import RESULTS
from finetune.evaluation.targets import Target, find_targets
from finetune.runs import RunDirectory, open_run

_SECTION = "evaluation."
_COMPARISON = "comparison.json"
"""A run beside other targets."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is measured, and with what."""

    targets: tuple[Target, ...]
    configs: Mapping[str, Config]
    """Of the runs among them, by their word."""
    settings: Evaluation
    destination: Path
    """The file that keeps the results."""
    base: str | None = None
    """The model under adapters that do not know theirs."""

    @property
    def tasks(self) -> dict[str, Task]:
        """By name, in their order."""
        return {task_name(task): task for task in self.settings.tasks}

    @property
    def replaces(self) -> str | None:
        """That there are results already where these will be kept, with their date; None where there are none."""
        if not self.destination.is_file():
            return None
        written = datetime.fromtimestamp(self.destination.stat().st_mtime).astimezone()
        return f"{self.destination} of {written:%Y-%m-%d %H:%M} will be replaced; --name OTHER keeps both"


def evaluation_request(
    words: Sequence[Path | str], overrides: Sequence[str], settings: Path | None, *, base: str | None = None, name: str | None = None
) -> Request:
    """The request that ``words`` and options make. The tasks are those of the file ``settings``, else of the first run, else the default.

    ConfigError where a word is no target, an option has no meaning, or a configuration is wrong.
    """
    _require_evaluation(overrides)
    targets = find_targets(words)
    if base is not None and all(target.kind != "adapter" for target in targets):
        raise ConfigError(
            "--base is for adapter directories, and none is among the targets", where="--base", fix="leave it out: a run knows its base"
        )
    runs = [target for target in targets if target.kind == "run"]
    own = settings is None and bool(runs)
    configs = {run.word: load_config(open_run(run.path).config, overrides if own and run is runs[0] else ()).config for run in runs}
    section = configs[runs[0].word].evaluation if own else load_evaluation(settings, overrides)
    return Request(targets, configs, section, _destination(targets, settings, name), base)


def _destination(targets: Sequence[Target], settings: Path | None, name: str | None) -> Path:
    run = next((target for target in targets if target.kind == "run"), None)
    folder = RunDirectory(run.path).evaluations if run else Path("eval")
    if name is not None:
        if not name.strip(".") or "/" in name or "\0" in name:
            raise ConfigError(f"{name!r} cannot name a file", where="--name", fix="use letters, digits, dots and dashes")
        return folder / f"{name}.json"
    if settings is not None:
        return folder / f"{settings.stem}.json"
    if run and len(targets) > 1:  # what the run's own settings found stays: its report, `doctor` and `sweep` read it
        return folder / _COMPARISON
    return folder / (RESULTS if run else f"{targets[0].name}.json")


def _require_evaluation(overrides: Sequence[str]) -> None:
    """ConfigError for an override of what was trained: a run is measured as it is."""
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith(_SECTION):
            raise ConfigError(
                f"{key} cannot be changed for an evaluation: the run is measured as it was trained",
                where=f"-o {key}=...",
                fix="override keys of `evaluation`; memory: -o evaluation.tokens_per_device=...",
            )
