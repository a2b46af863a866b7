"""The models that are compared: the base, the tuned one, and further directories, each as something that can be scored."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from finetune.config.schema import NoQuantization
from finetune.errors import ConfigError
from finetune.finished import FinishedRun
from finetune.model.load import DTYPES, load_base
from finetune.scoring import Scorer
from finetune.sealed import read_json


@dataclass(frozen=True, slots=True)
class System:
    """One model under test."""

    name: str
    """``base``, ``tuned``, or a directory's name."""
    scorer: Scorer
    using: Callable[[], AbstractContextManager[object]]
    """Context in which the scorer's model is this system (the base is the tuned model with its adapter set back)."""


def base_and_tuned(finished: FinishedRun) -> list[System]:
    """The two systems of every run."""
    model, using = finished.untrained()
    return [System("base", finished.scorer(model), using), System("tuned", finished.scorer(finished.model), nullcontext)]


def directory_system(finished: FinishedRun, directory: Path) -> System:
    """A plain model directory, such as a merged one, in the type it is stored in: what is measured is what would be served."""
    if not (directory / "config.json").is_file():
        raise ConfigError(
            "not a model directory: config.json is missing", where=str(directory), fix="name a directory written by `finetune merge`"
        )
    stored = read_json(directory / "config.json").get("dtype")
    precision = "bf16" if stored == "bfloat16" else "fp32"  # fp16 values are exact in fp32
    model = load_base(directory, NoQuantization(), DTYPES[precision], finished.device)
    return System(directory.name, Scorer(model, finished.device, precision, finished.resolved.tokens_per_device.value), nullcontext)
