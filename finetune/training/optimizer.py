"""Parameter groups with their own learning rate and decay, the optimizer, and the schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from finetune.config.schema import ROLES, Group, Optimizer, Schedule
from finetune.errors import ConfigError, HardwareError, Problem
from finetune.model.targets import roles_of
from finetune.planning.steps import Steps

REST = "(rest)"
"""Name of the group of parameters that no entry of `optimizer.groups` matches."""


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    learning_rate: float
    """Peak rate; the schedule multiplies it."""
    weight_decay: float
    names: tuple[str, ...]
    parameters: int
    """Number of scalars."""

    def summary(self) -> dict[str, Any]:
        """For plan.json and the table: everything but the names."""
        return {key: value for key, value in asdict(self).items() if key != "names"} | {"tensors": len(self.names)}


def assign_groups(parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizer) -> list[ParameterGroup]:
    """Put each trainable parameter into exactly one group; the first matching entry wins.

    LoRA+ (2402.12354) multiplies the rate of every B within its group. Norms, biases and magnitudes (everything with fewer than two
    dimensions) are not decayed unless a group that names them states a decay. Raises ConfigError for an entry that matches nothing.
    """
    members: dict[tuple[str, bool, bool], list[str]] = {}
    for name, parameter in parameters.items():
        entry = next((key for key in optimizer.groups if _matches(key, name)), REST)
        is_b = optimizer.lora_plus_ratio != 1.0 and "lora-b" in roles_of(name)
        members.setdefault((entry, is_b, _decays(entry, optimizer, parameter)), []).append(name)
    _require_matches(parameters, optimizer, {entry for entry, _, _ in members})
    order = {entry: position for position, entry in enumerate([*optimizer.groups, REST])}
    return [
        _group(key, names, parameters, optimizer)
        for key, names in sorted(members.items(), key=lambda item: (order[item[0][0]], item[0][1], not item[0][2]))
    ]


def _group(
    key: tuple[str, bool, bool], names: list[str], parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizer
) -> ParameterGroup:
    entry, is_b, decays = key
    stated = optimizer.groups.get(entry, Group())
    rate = stated.learning_rate if stated.learning_rate is not None else optimizer.learning_rate * (stated.lr_ratio or 1.0)
    decay = optimizer.weight_decay if stated.weight_decay is None else stated.weight_decay
    label = entry + (" B" if is_b else "") + ("" if decays else ", no decay")
    count = sum(parameters[name].numel() for name in names)
    return ParameterGroup(label, rate * (optimizer.lora_plus_ratio if is_b else 1.0), decay if decays else 0.0, tuple(names), count)


def _matches(entry: str, name: str) -> bool:
    return entry in roles_of(name) if entry in ROLES else re.search(entry, name) is not None


def _decays(entry: str, optimizer: Optimizer, parameter: torch.nn.Parameter) -> bool:
    if parameter.ndim >= 2:
        return True
    asked_by_name = entry not in ("attention", "mlp", "embeddings", "lm_head", REST)
    return asked_by_name and optimizer.groups[entry].weight_decay is not None


def _require_matches(parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizer, used: set[str]) -> None:
    available = sorted({role for name in parameters for role in roles_of(name)})
    problems = []
    for entry in optimizer.groups:
        if entry in used:
            continue
        taken = any(_matches(entry, name) for name in parameters)
        what = "matches only parameters that earlier groups took" if taken else "matches no trainable parameter"
        fix = (
            "put it before them"
            if taken
            else f"roles that match here: {', '.join(available)}; or a regular expression over parameter names"
        )
        problems.append(Problem(f"the group {entry!r} {what}", f"optimizer.groups.{entry}", fix))
    if problems:
        raise ConfigError.from_problems(problems)


def build_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], groups: list[ParameterGroup], optimizer: Optimizer
) -> torch.optim.Optimizer:
    """AdamW over ``groups``; each keeps its peak rate under ``peak`` for the schedule."""
    tensors: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": group.learning_rate,
            "peak": group.learning_rate,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    options: dict[str, Any] = {"betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.epsilon}
    if optimizer.method == "adamw":
        return torch.optim.AdamW(tensors, **options)
    return _bitsandbytes(optimizer.method)(tensors, **options)


def _bitsandbytes(method: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise HardwareError(
            f"{method} needs bitsandbytes: {error}", where="optimizer.method", fix="use adamw, or install bitsandbytes"
        ) from error
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw-8bit": optim.AdamW8bit,
        "paged-adamw-8bit": optim.PagedAdamW8bit,
        "paged-adamw-32bit": optim.PagedAdamW32bit,
    }
    return classes[method]


def rate_factor(schedule: Schedule, steps: Steps, step: int) -> float:
    """What multiplies every peak rate in optimizer step ``step`` (0-based): linear warm-up, then the stated shape."""
    if step < steps.warmup:
        return (step + 1) / steps.warmup
    if schedule.method == "constant":
        return 1.0
    progress = (step - steps.warmup) / max(1, steps.total - steps.warmup)
    falling = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.method == "cosine" else 1.0 - progress
    return schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * falling


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak rate by ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
