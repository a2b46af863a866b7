"""Whether a run may be continued: everything that decides its numbers must be as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from finetune.config.schema import Config
from finetune.errors import ConfigError, Problem
from finetune.runs import RunDirectory, read_json

_NOT_COMPARED: dict[str, Any] = {
    "output": True,
    "tracking": True,
    "evaluation": True,
    "train": {"tokens_per_device": True, "gradient_checkpointing": True, "checkpoint": True},
}
"""What does not change what is trained, only where it goes, how much memory it takes and what is kept. (The cut into micro-batches decides
which numbers dropout draws, so a run with dropout that goes on with other tokens_per_device is equal in distribution, not bitwise.)"""


def identity(config: Config, prints: Mapping[str, str], parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run; ``prints`` are fingerprints of data, base and template."""
    settings = config.model_dump(mode="json", exclude=_NOT_COMPARED)
    return {
        "config": settings,
        "fingerprints": dict(prints),
        "trainable": {name: list(parameter.shape) for name, parameter in parameters.items()},
    }


def require_same(run: RunDirectory, now: Mapping[str, Any]) -> None:
    """ConfigError that names every difference between the run on disk and ``now`` (pitfall A2)."""
    before = read_json(run.environment)["identity"]
    problems = [
        Problem(
            f"{key} is {_shown(new)}, but the run was started with {_shown(old)}", str(run.path), "resume with the run's own config.yaml"
        )
        for key, old, new in _differences(before, now)
    ]
    if problems:
        raise ConfigError.from_problems(problems)


def _differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = sorted(set(before) | set(now))
        return [found for name in names for found in _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)]
    return [] if before == now else [(key.removeprefix("config."), before, now)]


def _shown(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
