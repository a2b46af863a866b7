"""Lion (2302.06675): the sign of an interpolated momentum; one state a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """W <- W - lr (sign(b1 m + (1 - b1) g) + weight_decay W), then m <- b2 m + (1 - b2) g. Its state is `exp_avg`, m."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        """``groups`` as for any torch optimizer, with `lr` and `weight_decay`."""
        super().__init__(groups, {"betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is not used."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        momentum = state["exp_avg"]
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.add_(torch.lerp(gradient, momentum, beta1).sign_(), alpha=-group["lr"])
        momentum.lerp_(gradient, 1.0 - beta2)
