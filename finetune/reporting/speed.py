"""How fast an earlier run of the same settings was, for the plan of the next."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.errors import FinetuneError
from finetune.hardware import Machine
from finetune.planning.throughput import Speed, measured_speed
from finetune.runs import RunDirectory
from finetune.sealed import read_json

_OF_TRAIN = {"batch_size", "tokens_per_device", "precision", "trainable_dtype", "gradient_checkpointing", "kernels", "compile"}


def speed_of_run(config: Config, machine: Machine, world: int) -> Speed | None:
    """Measured by the run that lies in `output`, where it computed the same on as many of the same devices; else None."""
    run = RunDirectory(Path(config.output))
    if not run.config.is_file() or not run.environment.is_file():
        return None
    with suppress(FinetuneError, KeyError, IndexError, OSError):  # a damaged run, or one of another version, tells nothing
        before, records = load_config(run.config).config, read_json(run.environment)
        same_machine = (records["machine"]["name"], records["sessions"][-1]["devices"]) == (machine.name, world)
        if same_machine and _computed(before) == _computed(config):
            return measured_speed(run.metric_rows(), str(run.path))
    return None


def _computed(config: Config) -> list[Any]:
    """All that decides what a token costs."""
    return [
        config.model.id,
        config.quantization,
        config.tuning,
        config.optimizer.method,
        config.data.max_tokens,
        config.data.supervise,
        config.distributed,
        config.train.model_dump(include=_OF_TRAIN),
    ]
