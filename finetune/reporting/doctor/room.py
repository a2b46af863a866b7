"""Whether a run would still fit on its own device after a change, by the estimate of `finetune plan` and by what it was seen to need."""

from __future__ import annotations

from typing import Any

from finetune.config.schema import Config
from finetune.errors import ConfigError
from finetune.hardware import Machine
from finetune.planning.length import DataCounts
from finetune.planning.lookup import find_shape
from finetune.planning.parameters import count_parameters
from finetune.planning.placement import Placement, Subject, place
from finetune.planning.strategy import Crowd
from finetune.reporting.doctor.evidence import Evidence

_LEFT = 0.1
"""Of the device's memory, to be left over: the bar of the estimate is 10 % (docs/adr/0029)."""


def has_room(evidence: Evidence, **train: Any) -> bool:
    """Whether the run fits with these keys of `train` changed, with a tenth of the device to spare; False where nobody can tell."""
    peak = max((step.memory_bytes or 0 for step in evidence.steps), default=0)
    now = {"tokens_per_device": evidence.tokens_per_device, "gradient_checkpointing": evidence.checkpointing}
    try:
        before, after = (_place(evidence, _changed(evidence.config, now | keys)) for keys in ({}, train))
    except ConfigError:  # the shapes of the model are not known, or its device lacks what the configuration asks for
        return False
    measured = peak * before.copies + after.needs - before.needs
    return max(after.needs, measured) <= (1 - _LEFT) * evidence.device.memory_bytes


def _changed(config: Config, keys: dict[str, Any]) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=keys)})


def _place(evidence: Evidence, config: Config) -> Placement:
    device, side, shape = evidence.device, evidence.data.train, find_shape(config.model)
    counts = DataCounts(
        side.examples, evidence.data.validation.examples, "the run", True, side.tokens, side.supervised, side.longest or None
    )
    crowd = Crowd(world=device.processes, on_this_machine=device.processes)
    subject = Subject(config, shape, count_parameters(shape, config), counts, crowd, None)
    machine = Machine(device.kind, device.name, device.devices, device.memory_bytes, device.bf16)
    return place(subject, machine)
