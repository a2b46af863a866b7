"""How many optimizer steps a run takes."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.schema import Config

DEFAULT_WARMUP_RATIO = 0.03


@dataclass(frozen=True, slots=True)
class Steps:
    """The run counted in optimizer steps."""

    per_epoch: int
    total: int
    warmup: int


def count_steps(config: Config, rows: int) -> Steps:
    """Steps for ``rows`` training examples. The last batch of an epoch may be smaller: no row is dropped."""
    per_epoch = -(-rows // config.train.batch_size)
    total = per_epoch * config.train.epochs
    if config.train.max_steps is not None:
        total = min(total, config.train.max_steps)
    return Steps(per_epoch, total, _warmup(config, total))


def _warmup(config: Config, total: int) -> int:
    if config.schedule.warmup_steps is not None:
        return min(config.schedule.warmup_steps, total)
    ratio = config.schedule.warmup_ratio
    return round((DEFAULT_WARMUP_RATIO if ratio is None else ratio) * total)
