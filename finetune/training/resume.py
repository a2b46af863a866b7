"""Whether a run may be continued: everything that decides its numbers must be as it was, or be a stated, recorded choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import torch
from pydantic import ValidationError

from finetune.config.schema import AdaLora, Config
from finetune.errors import ConfigError, Problem
from finetune.planning.steps import Steps
from finetune.runs import RunDirectory
from finetune.sealed import read_json
from finetune.training.checkpoints import Progress
from finetune.training.optimizer import rate_factor

_NOT_COMPARED: dict[str, Any] = {
    "output": True,
    "tracking": True,
    "evaluation": True,
    "distributed": True,
    "data": {"processes": True},
    "train": {"tokens_per_device": True, "gradient_checkpointing": True, "checkpoint": True, "samples": True},
}
"""What does not change what is trained, only where it goes, how much memory it takes and what is kept. (The cut into micro-batches decides
which numbers dropout draws, so a run with dropout that goes on with other tokens_per_device is equal in distribution, not bitwise.)"""
_LENGTH = ("train.epochs", "train.max_steps")
"""May grow without further words: that is how a run is extended."""
_ACCEPTABLE = (
    *(f"optimizer.{name}" for name in ("learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "groups", "lora_plus_ratio")),
    *("schedule", "tuning.dropout", "data", "model.id", "model.revision"),
    *(f"train.{name}" for name in ("max_grad_norm", "evaluate", "early_stopping", "kernels", "compile")),
    *(f"fingerprints.{name}" for name in ("data", "base", "chat template")),
)
"""What a run can go on with although it changed, if the user says so. All else has no meaning for the weights and states on disk."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not as it was when the run was started, or last resumed."""

    key: str
    before: Any
    now: Any


def identity(config: Config, prints: Mapping[str, str], parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run; ``prints`` are fingerprints of data, base and template."""
    return {
        "config": _compared(config),
        "fingerprints": dict(prints),
        "trainable": {name: list(parameter.shape) for name, parameter in parameters.items()},
    }


def _compared(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_NOT_COMPARED)


def same_settings(run: RunDirectory, config: Config) -> bool:
    """Whether ``config`` says what the run on disk was trained with; data and base are not looked at."""
    return not _differences(_settings(run), _compared(config))


def reconcile(run: RunDirectory, now: Mapping[str, Any], config: Config, steps: Steps, accepted: Sequence[str]) -> tuple[Change, ...]:
    """What changed since the run on disk, where all of it may stand: it is longer, or the user ``accepted`` it by name.

    ConfigError that names every other difference (pitfall A2), with the option that accepts it where one does, and every accepted name
    that is no difference.
    """
    before = {**read_json(run.environment)["identity"], "config": _settings(run)}
    changes = tuple(_differences(before, now))
    problems = [problem for change in changes if (problem := _problem(run, change, config, steps, accepted))]
    for name in accepted:
        if not any(_covers(name, change.key) for change in changes):
            problems.append(_needless(name))
    if problems:
        raise ConfigError.from_problems(problems)
    return changes


def _problem(run: RunDirectory, change: Change, config: Config, steps: Steps, accepted: Sequence[str]) -> Problem | None:
    what = f"{change.key} is {_shown(change.now)}, but the run was started with {_shown(change.before)}"
    same = f"resume with the run's own settings: finetune train {run.config} --resume"
    if change.key in _LENGTH:
        if steps.total < planned_steps(run):
            return Problem(f"{what}; a run can be lengthened, not shortened", str(run.path), same)
        if isinstance(config.tuning, AdaLora):
            return Problem(f"{what}; AdaLoRA's rank schedule is laid over the whole run", str(run.path), same)
        return None
    if not any(_covers(name, change.key) for name in _ACCEPTABLE):
        return Problem(what, str(run.path), f"{same}; with this change it is a new run: -o output=...")
    if any(_covers(name, change.key) for name in accepted):
        return None
    return Problem(what, str(run.path), f"{same}; or go on with the change, which is recorded: --accept '{change.key}'")


def _needless(name: str) -> Problem:
    where, known = f"--accept {name}", any(_covers(name, key) or _covers(key, name) for key in _ACCEPTABLE)
    if known:
        return Problem(f"{name} is as it was when the run was started", where, "leave the option out")
    near = get_close_matches(name, _ACCEPTABLE, n=1, cutoff=0.7) or [key for key in _ACCEPTABLE if key.endswith(name)][:1]
    return Problem(f"{name} is nothing that can be accepted", where, f"write {near[0]}" if near else f"one of {', '.join(_ACCEPTABLE)}")


def planned_steps(run: RunDirectory) -> int:
    """Optimizer steps of the run on disk, as it was last started."""
    return int(read_json(run.plan)["steps"]["total"])


def stretched(config: Config, before: Steps, now: Steps, progress: Progress) -> str:
    """What extending the run from ``before`` to ``now`` means for the learning rate, in a sentence."""
    old = rate_factor(config.schedule, before, min(progress.step, before.total - 1))
    new = rate_factor(config.schedule, now, progress.step)
    return (
        f"extended from {before.total} to {now.total} steps: the schedule ({config.schedule.method}) now lies over all {now.total}, so that"
        f" step {progress.step + 1} runs at {new:.3g} of the peak rate; it stood at {old:.3g}"
    )


def adjusted(progress: Progress, changes: Sequence[Mapping[str, Any]], config: Config) -> Progress:
    """``progress`` without what the recorded ``changes`` made void: losses on other rows are not comparable, and a run that may go on for
    longer without a gain, or that no longer may stop early, has not stopped."""
    if any(change["key"] == "fingerprints.data" for change in changes):
        progress = progress.advanced(best_loss=None, best_step=None, patience_loss=None, evaluations_without_gain=0)
    early = config.train.early_stopping
    return progress.advanced(
        stopped_early=progress.stopped_early and early is not None and progress.evaluations_without_gain >= early.patience
    )


def session_record(began: str, progress: Progress, devices: int, changes: Sequence[Change], notes: Sequence[str]) -> dict[str, Any]:
    """What environment.json says of one start or resumption."""
    shown = [asdict(change) for change in changes]
    return {"began": began, "from_step": progress.step, "devices": devices, "changes": shown, "notes": list(notes)}


def steps_on_disk(run: RunDirectory) -> Steps:
    """The run's length and warm-up as it was last started."""
    return Steps(**read_json(run.plan)["steps"])


def _settings(run: RunDirectory) -> Any:
    """The settings that the run was started with. A key that this version of the program added has its default, for that is what the
    run was trained with."""
    stored = read_json(run.environment)["identity"]["config"]
    try:
        return _compared(Config.model_validate({**stored, "output": str(run.path)}))
    except ValidationError:  # a key is gone since: it is named as a difference
        return stored


def _differences(before: Any, now: Any, key: str = "") -> list[Change]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = sorted(set(before) | set(now))
        return [found for name in names for found in _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)]
    return [] if before == now else [Change(key.removeprefix("config."), before, now)]


def _covers(name: str, key: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _shown(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
