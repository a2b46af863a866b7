"""Combinations of values that cannot work, found before anything is downloaded or loaded.

Each check reads a whole configuration and yields what is wrong, with the paths that it looked at: the first is where the error points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from finetune.config import (
    compile_checks,
    data_checks,
    distributed_checks,
    evaluation_checks,
    group_checks,
    knowledge_checks,
    name_checks,
    optimizer_checks,
    sample_checks,
    schedule_checks,
    tuning_checks,
)
from finetune.config.finding import Finding
from finetune.config.schema import Config


def check(config: Config) -> list[Finding]:
    """Everything that cannot work."""
    return [finding for one in _CHECKS for finding in one(config)]


_CHECKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    name_checks.names,
    tuning_checks.quantization,
    tuning_checks.starts,
    tuning_checks.patterns,
    tuning_checks.targets,
    tuning_checks.adalora,
    tuning_checks.trainable_types,
    tuning_checks.prefix,
    tuning_checks.new_tokens,
    optimizer_checks.learning_rates,
    optimizer_checks.unread,
    optimizer_checks.galore,
    optimizer_checks.muon,
    optimizer_checks.lora_plus,
    group_checks.groups,
    schedule_checks.warmup,
    schedule_checks.decay,
    distributed_checks.strategy,
    compile_checks.compiled,
    data_checks.columns,
    data_checks.facts,
    data_checks.twice,
    data_checks.validation,
    data_checks.tasks,
    evaluation_checks.evaluation_tasks,
    sample_checks.samples,
    knowledge_checks.knowledge,
)
