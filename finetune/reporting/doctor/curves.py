"""Figures of a loss curve: where it began and ended, how noisy it is, when it fell, and where it jumped. Plain Python: curves are short."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from statistics import mean, median

from finetune.reporting.doctor.evidence import Step

LEAST_STEPS = 20
"""A level is the mean of at least three steps and noise comes from differences of neighbours: with fewer steps than this neither is known
well enough to tell a trend from chance."""
_START, _END = 1 / 20, 1 / 10
"""Share of the steps that the level at either end is taken over."""
_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_WINDOW = 10
"""Steps before a jump that it is compared with."""
_JUMP = 6.0
"""Standard deviations; a normal distribution has one in a billion above it, the losses of real batches have heavier tails."""
_JUMP_SHARE = 0.2
"""Of the loss the run began at: lower jumps cost nothing."""
NOTICEABLE = 0.1
"""Nats a token: a rise below it costs nothing, however small the loss was before."""
_HUMP = 3
"""Least steps of a rise, a twentieth of all where that is more: one odd batch does not fill them, and what is over sooner does no harm."""


@dataclass(frozen=True, slots=True)
class Course:
    """The training loss over a run, in nats a supervised token."""

    initial: float
    """Over the first twentieth of the steps, which the warm-up keeps near the base."""
    first: float
    """Of the first step alone: the base, whatever the rate."""
    first_error: float
    """Standard error of the difference between such a level and the first step, odd batches in full: the first may be an easy one."""
    final: float
    """Over the last tenth."""
    error: float
    """Standard error of the difference of the two."""
    noise: float
    """Standard deviation of one step around the trend, in the second half."""
    highest: float
    """Highest median of a twentieth of the steps (three at least), after the first: one odd batch does not move it."""
    late_spread: float
    """Standard deviation of one step in the second half, odd batches in full; what a ruined start adds to the noise is not in it."""
    late_ratio: float
    """The same of the logarithm of the loss."""
    level_steps: tuple[int, int]
    """Steps that `highest` and `final` are each taken over."""
    late_share: float
    """Of the fall, in the second half of the learning rate that was spent: 0.5 for a straight line, which has not begun to converge;
    near 0 where the loss had come to rest."""
    jumps: int
    """Steps that stand far above those before them, and the next one with them: one odd batch is none."""

    @property
    def fall(self) -> float:
        """By how much the loss fell."""
        return self.initial - self.final

    @property
    def relative_fall(self) -> float:
        """As a share of where it began."""
        return self.fall / self.initial


@lru_cache(maxsize=4)
def course(steps: tuple[Step, ...]) -> Course:
    """The course of ``steps``, at least `LEAST_STEPS` of them."""
    losses = [step.loss for step in steps]
    half, count = len(steps) // 2, len(steps)
    start, end = max(3, round(_START * count)), max(3, round(_END * count))
    initial, final = _level(steps[:start]), _level(steps[-end:])
    early, late = _noise(losses[:half]), _noise(losses[half:])
    width = max(_HUMP, start)
    levels = [median(losses[at : at + width]) for at in range(1, count - width + 1)]
    middle = _half_spent(steps)
    there = _level(steps[max(0, middle - end // 2) : middle + end // 2 + 1])
    fall = initial - final
    return Course(
        initial=initial,
        first=losses[0],
        first_error=_spread(losses[:half]) * math.sqrt(1 + 1 / width),
        final=final,
        error=math.hypot(early / math.sqrt(start), late / math.sqrt(end)),
        noise=late,
        highest=max(levels),
        late_spread=_spread(losses[half:]),
        late_ratio=_spread([math.log(max(loss, NOTICEABLE)) for loss in losses[half:]]),
        level_steps=(width, end),
        late_share=(there - final) / fall if fall > 0 else 0.0,
        jumps=len(_jumps(losses, max(NOTICEABLE, _JUMP_SHARE * initial))),
    )


def _level(steps: Sequence[Step]) -> float:
    """Mean over supervised tokens."""
    return sum(step.loss * step.supervised for step in steps) / sum(step.supervised for step in steps)


def _noise(losses: Sequence[float]) -> float:
    """Standard deviation of one step around a smooth trend, by the differences of neighbours: the trend hardly enters them."""
    differences = [later - earlier for earlier, later in pairwise(losses)]
    centre = median(differences)
    return _NORMAL * median(abs(difference - centre) for difference in differences) / math.sqrt(2)


def _spread(losses: Sequence[float]) -> float:
    """As `_noise`, but by squares, so that single steps far off weigh as much as they do in a level."""
    return math.sqrt(mean((later - earlier) ** 2 for earlier, later in pairwise(losses)) / 2)


def _half_spent(steps: Sequence[Step]) -> int:
    """Index of the step at which half of all learning rate was spent: an optimizer moves weights by rate times steps, not by steps."""
    spent = list(accumulate(step.rate for step in steps))
    return next(index for index, so_far in enumerate(spent) if so_far >= spent[-1] / 2)


def _jumps(losses: Sequence[float], least: float) -> list[int]:
    found, index = [], _WINDOW
    while index < len(losses) - 1:
        before = losses[index - _WINDOW : index]
        centre = median(before)
        spread = _NORMAL * median(abs(loss - centre) for loss in before)
        above = max(_JUMP * spread, least)
        if losses[index] - centre > above and losses[index + 1] - centre > above / 2:
            found.append(index)
            index += _WINDOW  # the steps that follow belong to the same jump
        else:
            index += 1
    return found
