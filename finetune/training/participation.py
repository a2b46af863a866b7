"""Proof that what is said to train does: a gradient in the first step, another value at the end (pitfall A11)."""

from __future__ import annotations

import torch

from finetune.config.schema import Config
from finetune.errors import VerificationError
from finetune.training.session import Session

Sums = dict[str, tuple[float, float]]


def require_gradients(session: Session) -> None:
    """Every trainable tensor takes part in the loss on some device (pitfall A11); VerificationError where one does not."""
    used = torch.tensor([float(parameter.grad is not None) for parameter in session.parameters.values()], device=session.scorer.device)
    if session.accelerator.num_processes > 1:
        used = session.accelerator.reduce(used, "sum")
    idle = [name for name, count in zip(session.parameters, used.tolist(), strict=True) if not count]
    if idle:
        raise VerificationError(
            f"{len(idle)} trainable tensors receive no gradient, first {idle[0]}",
            where="the first step",
            fix="remove their modules from tuning.targets",
        )


def sums_of(parameters: dict[str, torch.nn.Parameter]) -> Sums:
    """Sum and sum of squares of each tensor, by which a change is seen."""
    return {name: (float(p.detach().double().sum()), float(p.detach().double().square().sum())) for name, p in parameters.items()}


def require_change(before: Sums, after: Sums, config: Config) -> None:
    """Every trainable tensor is another than ``before``; VerificationError where one is not."""
    still = [name for name, sums in before.items() if sums == after[name]]
    if still:
        fix = "raise their learning rate or remove their modules"
        if config.train.trainable_dtype == "bf16":
            fix = f"set train.trainable_dtype: fp32, for bf16 rounds small updates away; or {fix}"
        raise VerificationError(
            f"{len(still)} trainable tensors did not change, first {still[0]}",
            where="the whole run",
            fix=fix,
        )
