"""The optimizers by name, and the schedule that scales their rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from finetune.config.schema import Galore, Optimizer, Schedule
from finetune.errors import HardwareError
from finetune.planning.groups import ParameterGroup
from finetune.planning.steps import Steps
from finetune.training.galore import GaLore
from finetune.training.lion import Lion

Groups = list[dict[str, Any]]

_FUSED_ON = ("cpu", "cuda", "xpu", "mps")
"""Where torch has a fused AdamW. On CPU it takes a third (LoRA) to a ninth (full) of the plain one's time, and resumes bitwise."""


def build_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], groups: list[ParameterGroup], optimizer: Optimizer
) -> torch.optim.Optimizer:
    """The optimizer of ``optimizer.method`` (resolved, not `auto`) over ``groups``; each keeps its peak rate under ``peak``.

    States have the type of their parameter, or 8 bits. HardwareError where bitsandbytes or the device lacks the method.
    """
    tensors: Groups = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": group.learning_rate,
            "peak": group.learning_rate,
            "weight_decay": group.weight_decay,
            "rule": group.rule,
        }
        for group in groups
    ]
    return _BUILDERS[optimizer.method](tensors, optimizer)


class Joined(torch.optim.Optimizer):
    """Optimizers over disjoint groups, seen as one: groups in the order they were given, one state by parameter."""

    def __init__(self, groups: Groups, parts: Mapping[str, Callable[[Groups], torch.optim.Optimizer]]) -> None:
        """``parts`` makes the optimizer of each value of the groups' `rule`; one that no group has is not made."""
        super().__init__(groups, {})
        chosen = {rule: [group for group in self.param_groups if group["rule"] == rule] for rule in parts}
        # torch keeps the dictionaries it is given, so that a rate set here is the part's rate
        self._parts = [make(chosen[rule]) for rule, make in parts.items() if chosen[rule]]
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of every part; ``closure`` is not used."""
        del closure
        for part in self._parts:
            part.step()


def _device(groups: Groups) -> torch.device:
    device: torch.device = groups[0]["params"][0].device
    return device


def _adamw(groups: Groups, optimizer: Optimizer) -> torch.optim.Optimizer:
    fused = _device(groups).type in _FUSED_ON
    return torch.optim.AdamW(groups, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon, fused=fused)


def _adafactor(groups: Groups, _: Optimizer) -> torch.optim.Optimizer:
    # torch multiplies each rate by max(eps2, root mean square of the weight). With 1 the rate is absolute, as for the other methods;
    # with torch's 0.001, a B that starts at zero would move a thousandth as far as its A.
    return torch.optim.Adafactor(groups, eps=(None, 1.0))


def _lion(groups: Groups, optimizer: Optimizer) -> torch.optim.Optimizer:
    return Lion(groups, betas=(optimizer.beta1, optimizer.beta2))


def _muon(groups: Groups, optimizer: Optimizer) -> torch.optim.Optimizer:
    def muon(own: Groups) -> torch.optim.Optimizer:
        # the adjustment gives updates the size of AdamW's (2502.16982), so that one learning rate serves both parts
        return torch.optim.Muon(own, momentum=optimizer.beta1, adjust_lr_fn="match_rms_adamw")

    return Joined(groups, {"own": muon, "adamw": lambda rest: _adamw(rest, optimizer)})


def _galore(groups: Groups, optimizer: Optimizer) -> torch.optim.Optimizer:
    settings = optimizer.galore or Galore()

    def galore(own: Groups) -> torch.optim.Optimizer:
        betas = (optimizer.beta1, optimizer.beta2)
        return GaLore(own, betas=betas, eps=optimizer.epsilon, rank=settings.rank, every_steps=settings.every_steps, scale=settings.scale)

    return Joined(groups, {"own": galore, "adamw": lambda rest: _adamw(rest, optimizer)})


def _from_bitsandbytes(name: str, alternative: str) -> Callable[[Groups, Optimizer], torch.optim.Optimizer]:
    """A builder of bitsandbytes' class ``name``; ``alternative`` is what to use where it cannot run."""

    def build(groups: Groups, optimizer: Optimizer) -> torch.optim.Optimizer:
        device, betas = _device(groups), (optimizer.beta1, optimizer.beta2)
        # Lion has no epsilon
        options = {"betas": betas} if name.startswith("Lion") else {"betas": betas, "eps": optimizer.epsilon}
        try:
            from bitsandbytes import optim

            kind: Callable[..., torch.optim.Optimizer] = getattr(optim, name)
            _try_out(kind, device)
        except (ImportError, NotImplementedError, RuntimeError, AttributeError) as error:
            raise HardwareError(
                f"{optimizer.method} does not run on this device ({device.type}): {error}",
                where="optimizer.method",
                fix=f"use {alternative}, or auto",
            ) from error
        return kind(groups, **options)

    return build


def _try_out(kind: Callable[..., torch.optim.Optimizer], device: torch.device) -> None:
    """One step on a tensor just large enough for 8-bit states: a missing kernel shows now, not after an hour of preparation."""
    probe = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    probe.grad = torch.ones_like(probe)
    kind([probe], lr=1e-3).step()


_BUILDERS: dict[str, Callable[[Groups, Optimizer], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw-8bit": _from_bitsandbytes("AdamW8bit", "adamw"),
    "paged-adamw-8bit": _from_bitsandbytes("PagedAdamW8bit", "adamw"),
    "paged-adamw-32bit": _from_bitsandbytes("PagedAdamW32bit", "adamw"),
    "adafactor": _adafactor,
    "lion": _lion,
    "lion-8bit": _from_bitsandbytes("Lion8bit", "lion"),
    "muon": _muon,
    "galore": _galore,
}


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
