"""Rules on what the machine did: memory that lay idle, and time spent waiting for rows."""

from __future__ import annotations

from finetune.config.schema import Prefix
from finetune.reporting.doctor.evidence import Evidence
from finetune.reporting.doctor.findings import Finding
from finetune.reporting.doctor.room import has_room
from finetune.reporting.doctor.rule import Rule

_USED = 0.5
"""Of the device's memory: a run that takes more has little to gain. Whether a change fits is for the estimate to say."""
_WAITING = 0.1
"""Share of the time: below it waiting hides behind what varies anyway."""
_FIRST = 3
"""Steps that warm caches and compile kernels."""
_LEAST_STEPS = 6
_GIB = 2**30


def _lacks_memory(evidence: Evidence) -> str | None:
    return None if any(step.memory_bytes for step in evidence.steps) else "the run did not record its memory"


def _unused_memory(evidence: Evidence) -> Finding | None:
    peak, have = max(step.memory_bytes or 0 for step in evidence.steps), evidence.device.memory_bytes
    if peak > _USED * have or not (overrides := _larger(evidence)):
        return None
    measured = {
        "peak memory, GiB": peak / _GIB,
        "memory of the device, GiB": have / _GIB,
        "tokens a micro-batch": evidence.tokens_per_device,
    }
    what = f"{peak / _GIB:.1f} of {have / _GIB:.0f} GiB were used"
    reason = "recomputing activations, or cutting steps into small micro-batches, costs time that this memory would save"
    return Finding("unused-memory", "advice", what, measured, reason, overrides)


def _larger(evidence: Evidence) -> tuple[str, ...]:
    """Activations kept first: that saves most. A CPU gains nothing from larger micro-batches, and no device from more than a step has.

    Nothing that would not fit with room to spare.
    """
    keeps = evidence.checkpointing and not isinstance(evidence.config.tuning, Prefix)
    if keeps and has_room(evidence, gradient_checkpointing=False):
        return ("train.gradient_checkpointing=false",)
    a_step = sum(step.tokens for step in evidence.steps) / len(evidence.steps)
    larger = 2 * evidence.tokens_per_device
    if evidence.device.kind == "cuda" and a_step > evidence.tokens_per_device and has_room(evidence, tokens_per_device=larger):
        return (f"train.tokens_per_device={larger}",)
    return ()


def _lacks_input(evidence: Evidence) -> str | None:
    if len(evidence.steps) < _LEAST_STEPS:
        return f"it needs {_LEAST_STEPS} steps, and there are {len(evidence.steps)}"
    known = all(step.input_seconds is not None for step in evidence.steps)
    return None if known else "the run did not record the time spent waiting for rows"


def _slow_input(evidence: Evidence) -> Finding | None:
    steps = evidence.steps[_FIRST:]
    waited, seconds = sum(step.input_seconds or 0.0 for step in steps), sum(step.seconds for step in steps)
    if waited < _WAITING * seconds:
        return None
    measured = {"seconds spent waiting for rows": waited, "seconds of all steps": seconds, "share": waited / seconds}
    what = f"{waited / seconds:.0%} of the time was spent waiting for rows"
    reason = "rows are read from the cache of prepared data while training waits: put it on a local disk with FINETUNE_CACHE"
    return Finding("slow-input", "advice", what, measured, reason)


MACHINE_RULES = (
    Rule("unused-memory", "memory that would make steps faster", _lacks_memory, _unused_memory),
    Rule("slow-input", "time spent waiting for rows", _lacks_input, _slow_input),
)
