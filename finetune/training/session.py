"""What the steps of a run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.config.schema import Config
from finetune.data.prepare import PreparedData
from finetune.hardware import peak_memory
from finetune.model.adapters import trainable
from finetune.planning.groups import ParameterGroup
from finetune.planning.steps import Steps
from finetune.scoring import Scorer
from finetune.training.checkpoints import Progress
from finetune.training.distributed import is_spread
from finetune.training.forks import Forks
from finetune.training.input_clock import InputClock
from finetune.training.lanes import Work, can_share
from finetune.training.metrics import Row
from finetune.training.samples import Sampler

CALMER = "lower optimizer.learning_rate or lengthen the warm-up; the last checkpoint is intact"
"""What to do about losses that are not finite."""


@dataclass(slots=True)
class Session:
    """Everything a step needs, built before the first one."""

    config: Config
    steps: Steps
    data: PreparedData
    scorer: Scorer
    optimizer: torch.optim.Optimizer
    groups: list[ParameterGroup]
    accelerator: Any
    record: Callable[[Row], None]
    """Where rows go: metrics.jsonl and whoever watches."""
    save: Callable[[Progress], None]
    """Write a checkpoint."""
    sampler: Sampler | None = None
    """What is asked while training."""
    parameters: dict[str, torch.nn.Parameter] = field(init=False)
    spread: bool = field(init=False)
    """Whether the blocks of the model are shared out, so that every device must run the same number of passes."""

    work: Work | None = field(init=False)
    """What examples cost, where cores compute micro-batches of their own, side by side."""
    clock: InputClock = field(init=False, default_factory=InputClock)
    forks: Forks | None = field(init=False, default=None)
    """Processes that compute lanes beside this one, while a run trains."""

    def __post_init__(self) -> None:
        self.parameters = trainable(self.scorer.model)
        self.spread = is_spread(self.scorer.model)
        self.work = Work.of(self.scorer.model) if can_share(self.scorer, self.accelerator.num_processes) else None

    def memory_bytes(self) -> int:
        """The most that this process and its forks have had so far of the memory they compute in."""
        if self.scorer.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.scorer.device)
        return peak_memory() + (self.forks.memory_bytes() if self.forks else 0)

    def any_device(self, flag: bool) -> bool:
        """Whether ``flag`` is up on any device: all of them decide alike."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.scorer.device), "sum") > 0)
