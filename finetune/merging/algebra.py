"""Several updates of one weight become one: average, task arithmetic, TIES, DARE.

Groundwork for a command that combines adapters (`finetune combine`); nothing calls it yet. All functions are pure and work on dense updates
delta_i = s_i B_i A_i of one weight, (d_out, d_in) or any other shape that all share, and return one in fp32. Signs and sizes of single
elements mean something in delta alone: in A or B they change with any rotation of the two.

The sum is PEFT's (`peft.utils.merge_utils`). Trimming, signs and masks are our own, because PEFT's differ from the papers in three places:
it elects signs before it weighs, so that a negative weight counts for the wrong side; it takes an election that ends at zero for a vote for
plus; and it draws DARE's masks from the global generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from peft.utils import merge_utils
from torch import Tensor


def average(deltas: Sequence[Tensor]) -> Tensor:
    """delta = 1/T sum_t delta_t."""
    return task_arithmetic(deltas, [1.0 / len(_checked(deltas))] * len(deltas))


def task_arithmetic(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """delta = sum_t w_t delta_t (2212.04089, section 2). A negative weight takes away what an update learned."""
    checked = _checked(deltas)
    if len(weights) != len(checked) or not all(map(math.isfinite, weights)):
        raise ValueError(f"{len(checked)} updates need as many finite weights, not {list(weights)}")
    summed: Tensor = merge_utils.task_arithmetic(checked, torch.tensor(weights, device=checked[0].device))
    return summed


def magnitude_prune(delta: Tensor, density: float) -> Tensor:
    """The share ``density`` (0 < density <= 1) of the elements of ``delta`` that are largest by magnitude; zero elsewhere.

    Trimming of TIES (2306.01708, section 4.1). floor(density n) of n elements are kept; of equal ones, those that come first.
    """
    _require_share(density, "density")
    flat = delta.float().flatten()
    # 0.29 of 100 elements is 29, not the 28 that 28.999999999999996 would be cut to
    kept = flat.abs().argsort(descending=True, stable=True)[: math.floor(density * flat.numel() + 1e-9)]
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(delta.shape)


def ties(deltas: Sequence[Tensor], density: float = 0.2, scale: float = 1.0) -> Tensor:
    """TIES (2306.01708, section 4.1, algorithm 1): trim, elect signs, average what agrees.

    With d_t the trimmed updates, for each element p

        gamma_p = sgn(sum_t d_tp),   A_p = {t : sgn(d_tp) = gamma_p},   delta_p = lambda / |A_p| sum_{t in A_p} d_tp

    and zero where no sign wins. ``density`` is the share of each update that is kept (the paper's k, 20 %), ``scale`` is lambda.
    """
    return scale * _agreed([magnitude_prune(delta, density) for delta in _checked(deltas)])


def dare(delta: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """DARE (2311.03099, equation 2): each element is dropped with probability ``drop`` (0 <= drop < 1), the others are divided by 1 - drop.

    Its expectation is ``delta``. ``generator`` is one of the CPU, so that every device drops the same elements.
    """
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"the share that is dropped lies in [0, 1), not {drop}")
    kept = torch.rand(delta.shape, generator=generator).to(delta.device) >= drop
    return delta.float() * kept / (1.0 - drop)


def dare_linear(deltas: Sequence[Tensor], weights: Sequence[float], drop: float, seed: int) -> Tensor:
    """sum_t w_t DARE(delta_t), masks drawn one after the other from ``seed``, which should differ from weight to weight."""
    return task_arithmetic(_dropped(deltas, drop, seed), weights)


def dare_ties(deltas: Sequence[Tensor], drop: float, seed: int, scale: float = 1.0) -> Tensor:
    """TIES with DARE in the place of trimming; masks as for `dare_linear`."""
    return scale * _agreed(_dropped(deltas, drop, seed))


def _dropped(deltas: Sequence[Tensor], drop: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [dare(delta, drop, generator) for delta in _checked(deltas)]


def _agreed(deltas: Sequence[Tensor]) -> Tensor:
    """The mean of the elements that have the elected sign; zero where no sign wins."""
    elected = torch.stack(tuple(deltas)).sum(0).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta in deltas:
        agrees = (delta.sign() == elected) & (elected != 0)
        total += delta * agrees
        count += agrees
    return total / count.clamp(min=1.0)


def _checked(deltas: Sequence[Tensor]) -> list[Tensor]:
    """``deltas`` in fp32; ValueError unless there is one at least and all have one shape."""
    shapes = {tuple(delta.shape) for delta in deltas}
    if len(shapes) != 1:
        raise ValueError(f"updates of one weight have one shape, not {sorted(shapes)}" if shapes else "there is nothing to combine")
    return [delta.float() for delta in deltas]


def _require_share(value: float, name: str) -> None:
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} lies in (0, 1], not {value}")
