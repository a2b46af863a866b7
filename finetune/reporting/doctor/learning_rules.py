"""Rules on the course of the training loss: the learning rate, the size of the adapter, the length of the run, the batch."""

from __future__ import annotations

import math

from finetune.reporting.doctor import changes
from finetune.reporting.doctor.curves import LEAST_STEPS, NOTICEABLE, Course, course
from finetune.reporting.doctor.evidence import Evidence, Step
from finetune.reporting.doctor.findings import Finding
from finetune.reporting.doctor.rule import Rule

_SIGMAS = 3.0
"""Standard errors that a difference of two levels must have to be seen."""
_RISE = 0.05
"""Of the initial loss: above it at the end, training did harm."""
_HUMP = 0.2
"""Of the first loss: a level this far above it on the way means that the model was lost and learned anew."""
_RUINED = 3.0
"""Times the loss of the first step: no batch but a broken model gives such a level, whatever the noise of the steps that broke it."""
_JUMPS = 3
"""One jump may be a row, and two a coincidence."""
_FLAT = 0.02
"""Fall of the loss, as a share of its start, that no run is made for."""
_VALIDATION_RISE = 0.03
"""Of the lowest validation loss. The same rows are scored each time, so that chance is small; 1 % comes and goes in sound runs."""
_LEAST_RISE = 0.02
"""Nats: below it nothing is lost, however small the loss was."""
_CREEP = 0.1
"""The same for a loss that still falls in a straight line: it has hardly begun."""
_STRAIGHT = 0.4
"""Share of the fall in the later half of the learning rate spent. 0.5 is a straight line; an exponential approach that has used up three of
its time constants has 0.18, one of the quickstart's runs 0.26."""
_LEARNED = 0.3
"""Nats: below it at the start there is nothing left to learn, and a flat curve is what should be."""
_LEAST_PART = 0.25
"""Of the planned steps, and the warm-up: earlier a flat curve means nothing."""
_NOISE = 0.25
"""Standard deviation of a step over its level: at a quarter, twenty steps still leave 5 % of doubt in a level."""
_SMALLEST_NOISE = 0.1
"""Nats: below it noise is no obstacle, however small the loss."""
_TIMES_CALMER = 4
"""Noise falls with the root of the batch: four times the rows halve it."""


def lacks_curve(evidence: Evidence) -> str | None:
    """A curve that is too short to have levels."""
    done = len(evidence.steps)
    return None if done >= LEAST_STEPS else f"a curve needs {LEAST_STEPS} steps, and there are {done}"


def _lacks_most(evidence: Evidence) -> str | None:
    done = len(evidence.steps)
    if evidence.state != "finished" and done < _LEAST_PART * evidence.planned_steps:
        return f"only {done} of {evidence.planned_steps} steps are done"
    return lacks_curve(evidence)


def _lacks_end(evidence: Evidence) -> str | None:
    return lacks_curve(evidence) if evidence.state == "finished" else "the run is not finished"


def _lacks_curve_or_failure(evidence: Evidence) -> str | None:
    return None if evidence.failure == "DivergedError" else lacks_curve(evidence)


def is_unstable(evidence: Evidence) -> bool:
    """Whether the loss rose above where it began, or jumped again and again: other rules cannot read such a curve."""
    if evidence.failure == "DivergedError":
        return True
    if len(evidence.steps) < LEAST_STEPS:
        return False
    found = course(evidence.steps)
    doubt = _SIGMAS * found.noise  # of the later half: a rate that is too high makes the noise of the earlier one
    ended_above = found.final > found.initial + max(doubt, _RISE * found.initial, NOTICEABLE)
    rose = found.highest > found.first + max(_SIGMAS * found.first_error, _HUMP * found.first, NOTICEABLE)
    return ended_above or rose or _is_ruined(found) or found.jumps >= _JUMPS


def _is_ruined(found: Course) -> bool:
    """Whether the loss rose several-fold, or ended above its first step, beyond what the later half's noise explains.

    A rate that breaks the model in its first steps makes both the level of the start and the noise around it useless.
    """
    width, end = found.level_steps
    several = max(math.log(_RUINED), _SIGMAS * found.late_ratio * math.sqrt(1 + 1 / width))
    above = max(_SIGMAS * found.late_spread * math.sqrt(1 + 1 / end), _RISE * found.first, NOTICEABLE)
    rose = math.log(found.highest / max(found.first, NOTICEABLE)) > several if found.highest > NOTICEABLE else False
    return rose or found.final > found.first + above


def _rate_too_high(evidence: Evidence) -> Finding | None:
    if not is_unstable(evidence):
        return None
    config, steps = evidence.config, evidence.steps
    measured: dict[str, float | int | str] = {"peak learning rate": max((group.learning_rate for group in evidence.groups), default=0.0)}
    measured["share of steps whose gradient was clipped"] = _clipped(steps, config.train.max_grad_norm)
    lost = evidence.failure == "DivergedError"
    what = "the loss or its gradient stopped being finite"
    if len(steps) >= LEAST_STEPS:
        found = course(steps)
        measured |= {"loss of the first step": found.first, "highest level of the loss": found.highest, "final loss": found.final}
        measured["jumps"] = found.jumps
        if not lost:
            lost = found.final > found.initial or found.highest > found.first * (1 + _HUMP)
            what = (
                f"the loss rose from {found.first:.2f} to {found.highest:.2f} and ended at {found.final:.2f}"
                if lost
                else f"the loss jumped {found.jumps} times"
            )
    factor = 0.1 if lost else 0.3
    overrides = changes.joined(changes.rate(config, factor), changes.warm_up(config), _clipping(config.train.max_grad_norm))
    reason = "steps of this size leave the region in which the gradient means anything; what was learned before is lost with each"
    return Finding("rate-too-high", "problem", what, measured, reason, overrides)


def _clipped(steps: tuple[Step, ...], limit: float | None) -> float:
    return sum(step.grad_norm > limit for step in steps) / len(steps) if limit and steps else 0.0


def _clipping(limit: float | None) -> changes.Overrides:
    return ("train.max_grad_norm=1.0",) if limit is None else ()


def is_flat(evidence: Evidence) -> bool:
    """Whether the loss stayed where it was, or fell a little in a straight line."""
    found = course(evidence.steps)
    if found.initial < _LEARNED or is_unstable(evidence):
        return False
    unmoved = found.relative_fall < _FLAT or (found.fall < _SIGMAS * found.error and found.relative_fall < _CREEP)
    return unmoved or (found.relative_fall < _CREEP and found.late_share >= _STRAIGHT)


def _flat_loss(evidence: Evidence) -> Finding | None:
    if not is_flat(evidence):
        return None
    found, config = course(evidence.steps), evidence.config
    rank = getattr(config.tuning, "rank", None)
    spent = sum(step.rate for step in evidence.steps)
    measured: dict[str, float | int | str] = {
        "initial loss": found.initial,
        "final loss": found.final,
    }
    measured |= {"peak learning rate": max(step.rate for step in evidence.steps), "learning rate summed over steps": spent}
    small = rank is not None and rank < 8  # below the ranks of style, the least that recipes use
    measured |= {"rank": rank} if rank is not None else {}
    reason = (
        "AdamW moves a weight by about the learning rate in each step, and all steps together were too short to change what the model "
        f"says{'; the rank leaves little room, too' if small else ''}"
    )
    overrides = changes.joined(changes.rate(config, 10.0), changes.capacity(config, 4) if small else ())
    what = f"the loss hardly moved: {found.initial:.3f} at the start, {found.final:.3f} at the end"
    return Finding("flat-loss", "problem", what, measured, reason, overrides)


def validation_rose(evidence: Evidence) -> bool:
    """Whether validation loss rose after its lowest point."""
    losses = [one.loss for one in evidence.evaluations]
    return bool(losses) and losses[-1] - min(losses) > max(_VALIDATION_RISE * min(losses), _LEAST_RISE)


def _underfitting(evidence: Evidence) -> Finding | None:
    found, config = course(evidence.steps), evidence.config
    if is_unstable(evidence) or is_flat(evidence) or validation_rose(evidence):  # more steps would make that worse
        return None
    if found.fall < max(_SIGMAS * found.error, NOTICEABLE) or found.late_share < _STRAIGHT:
        return None
    measured = {"initial loss": found.initial, "final loss": found.final, "share of the fall in the later half": found.late_share}
    what = f"the loss was still falling as fast as before when the run ended at {found.final:.3f}"
    reason = "measured by the learning rate that was spent, the later half brought as much as the earlier one: more steps will bring more"
    steps = config.train.epochs * per_epoch(evidence) if config.train.max_steps is None else evidence.steps[-1].step
    return Finding("underfitting", "advice", what, measured, reason, changes.length(config, 2 * steps, per_epoch(evidence)))


def per_epoch(evidence: Evidence) -> int:
    """Steps of a pass over the data."""
    return max(1, -(-evidence.data.train.examples // evidence.config.train.batch_size))


def _noisy_batch(evidence: Evidence) -> Finding | None:
    found, config = course(evidence.steps), evidence.config
    half = evidence.steps[len(evidence.steps) // 2 :]
    level = sum(step.loss for step in half) / len(half)
    rows = evidence.data.train.examples
    if is_unstable(evidence) or found.noise < max(_NOISE * level, _SMALLEST_NOISE) or config.train.batch_size >= rows:
        return None
    supervised = sum(step.supervised for step in half) / len(half)
    measured = {"standard deviation of a step": found.noise, "mean loss": level, "supervised tokens a step": supervised}
    measured["batch size"] = config.train.batch_size
    what = f"the loss varies by {found.noise / level:.0%} from step to step"
    reason = (
        "a gradient is as noisy as the loss of its batch, so the steps point to where single rows lead; the rate then has to be small, or "
        "the noise is learned"
    )
    size = min(rows, config.train.batch_size * _TIMES_CALMER)
    return Finding("noisy-batch", "advice", what, measured, reason, (f"train.batch_size={size}",))


LEARNING_RULES = (
    Rule("rate-too-high", "a loss that diverges, rises above its start or jumps again and again", _lacks_curve_or_failure, _rate_too_high),
    Rule("flat-loss", "a loss that stays flat and high: the rate or the rank is too low", _lacks_most, _flat_loss),
    Rule("underfitting", "a loss that still falls in a straight line when the run ends", _lacks_end, _underfitting),
    Rule("noisy-batch", "a loss that varies from step to step by a large part of itself", lacks_curve, _noisy_batch),
)
