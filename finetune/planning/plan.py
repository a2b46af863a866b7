"""What a run will be, from its configuration and the shapes of its model: parameters, memory, which GPUs hold it, length, time and energy.

No weight is read and torch is not loaded. What the run decides by itself is decided here as it will be there (`planning.resolve`); what
is an estimate says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from finetune.config.schema import Config
from finetune.errors import HardwareError
from finetune.hardware import Machine
from finetune.planning.fit import MARGIN, Change, Device, smallest_change
from finetune.planning.gpus import GPUS, Gpu, called
from finetune.planning.length import DataCounts, Length, length_of
from finetune.planning.lookup import find_shape
from finetune.planning.parameters import Parameters, count_parameters
from finetune.planning.placement import Placement, Subject, machine_of, place
from finetune.planning.resolve import Resolved
from finetune.planning.shapes import ModelShape
from finetune.planning.strategy import Crowd
from finetune.planning.throughput import Cost, Speed, cost_of, estimated_speed, operations_per_token

__all__ = ["DataCounts", "Plan", "make_plan", "refuse_hopeless"]

_ALONE = Crowd()


@dataclass(frozen=True, slots=True)
class Candidate:
    """The run on one of the common GPUs."""

    gpu: Gpu
    placement: Placement
    speed: Speed
    cost: Cost | None
    """None where the tokens of the run are not known."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What `finetune plan` shows and plan.json keeps."""

    config: Config
    shape: ModelShape
    parameters: Parameters
    here: Placement
    """On the machine that was asked about."""
    change: Change | None
    """The smallest one after which the run fits there; None where it fits, or nothing helps."""
    candidates: tuple[Candidate, ...]
    """By memory, then by speed."""
    candidate_change: Change | None
    """Where no common GPU holds the run: the smallest change after which the largest of them does."""
    length: Length | None
    """None where nothing is known of the data."""
    speed: Speed | None
    """None on a machine whose rate is not known."""
    cost: Cost | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, sizes in bytes; plan.json of a run holds it under `plan`."""
        return {
            "model": self.config.model.id,
            "family": self.shape.family,
            "shapes_from": self.shape.where,
            "tuning": self.config.tuning.method,
            "quantization": self.config.quantization.method,
            "parameters": _parameters(self.parameters),
            "device": self.here.as_dict(),
            "memory_bytes_by_part": self.here.memory.parts,
            "resolved": self.here.resolved.as_dict(),
            "change": _change(self.change),
            "gpus": [_candidate(candidate) for candidate in self.candidates],
            "change_of_the_largest_gpu": _change(self.candidate_change),
            "length": _length(self.length),
            "speed": asdict(self.speed) if self.speed else None,
            "cost": asdict(self.cost) if self.cost else None,
        }


def make_plan(
    config: Config,
    machine: Machine,
    data: DataCounts | None,
    *,
    crowd: Crowd = _ALONE,
    speed: Speed | None = None,
    resolved: Resolved | None = None,
) -> Plan:
    """The plan of ``config`` on ``machine``, alone or in ``crowd`` (whose weights are not looked at).

    ``resolved``: what a run has decided already. ``speed``: stated or measured there; without it, it is estimated where the GPU's rate is
    known. ConfigError where the model's shapes are not known, where `tuning` fits nothing in it, and where the configuration asks for
    what the machine lacks.
    """
    shape = find_shape(config.model)
    subject = Subject(config, shape, count_parameters(shape, config), data, crowd, resolved)
    elsewhere = replace(subject, resolved=None)
    length = length_of(config, data) if data else None
    here = place(subject, machine)
    listed = called(machine.name)
    if speed is None and listed is not None:
        speed = _estimated(subject, here, listed, length)
    candidates = tuple(_candidate_of(elsewhere, gpu, length) for gpu in GPUS)
    none_fits = not any(candidate.placement.fits for candidate in candidates)
    return Plan(
        config=config,
        shape=shape,
        parameters=subject.parameters,
        here=here,
        change=_change_for(subject, here),
        candidates=candidates,
        candidate_change=_change_for(elsewhere, candidates[-1].placement) if none_fits else None,
        length=length,
        speed=speed,
        cost=_cost(length, speed, listed.watts * crowd.world if listed else None),
    )


def refuse_hopeless(plan: Plan, swap_bytes: int = 0) -> None:
    """HardwareError where the run cannot fit on the machine of ``plan``, with ``swap_bytes`` beside its memory, however it is cut."""
    here = plan.here
    if not here.is_hopeless(swap_bytes):
        return
    what = (
        f"this run cannot fit: weights, gradients, states and the smallest micro-batch take {_gib(here.least)} of a device, "
        f"which has {_gib(here.machine.memory_bytes + swap_bytes)}"
    )
    raise HardwareError(what, where=here.machine.name, fix=fix_of(plan.change, here))


def fix_of(change: Change | None, placement: Placement) -> str:
    """What makes the run fit on the devices of ``placement``, as options of the command line."""
    if change is None:
        bigger = next((gpu.name for gpu in GPUS if gpu.usable_bytes > max(placement.needs, placement.machine.memory_bytes)), None)
        device = f"a larger device, such as {bigger} (finetune plan says which)" if bigger else "several large devices"
        return f"no setting makes it fit there: use {device}, or a smaller model"
    return f"{options_of(change, placement)} (then {needed_after(change, placement)})"


def needed_after(change: Change, placement: Placement) -> str:
    """What a device must hold after ``change``."""
    memory = change.memory
    needs = memory.total * placement.copies
    tight = memory.spillable and needs > (1 - MARGIN) * placement.machine.memory_bytes
    waiting = f", and {_gib(memory.host)} of host memory" if memory.host else ""
    return f"{_gib(needs)} of a device" + (f", of which {_gib(memory.spillable)} may spill to host memory" if tight else "") + waiting


def options_of(change: Change, placement: Placement) -> str:
    """``change`` as options of `finetune plan` and `finetune train`."""
    options = [f"-o {override}" for override in change.overrides]
    if change.devices != placement.setting.world:
        options.append(f"--devices {change.devices}")
    return " ".join(options)


# --- parts ---------------------------------------------------------------------------------------------------------------------------


def _estimated(subject: Subject, placement: Placement, gpu: Gpu, length: Length | None) -> Speed:
    share = length.supervised_share if length else None
    shape, parameters, config = subject.shape, subject.parameters, subject.config
    operations = operations_per_token(shape, parameters, config, placement.setting, 1.0 if share is None else share)
    return estimated_speed(operations, gpu, subject.world)


def _candidate_of(subject: Subject, gpu: Gpu, length: Length | None) -> Candidate:
    placement = place(subject, machine_of(gpu, subject.world))
    speed = _estimated(subject, placement, gpu, length)
    return Candidate(gpu, placement, speed, _cost(length, speed, gpu.watts * subject.world))


def _cost(length: Length | None, speed: Speed | None, watts: float | None) -> Cost | None:
    return cost_of(length.tokens, speed, watts) if length and length.tokens and speed else None


def _change_for(subject: Subject, placement: Placement) -> Change | None:
    """The smallest change that makes a placement fit, where it does not."""
    if placement.fits:
        return None
    # processes on a CPU share one memory: more of them never help
    device = Device(placement.room, **({"most": subject.world} if placement.machine.kind == "cpu" else {}))
    return smallest_change(subject.shape, subject.config, placement.setting, device, subject.longest)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


# --- as JSON -------------------------------------------------------------------------------------------------------------------------


def _parameters(parameters: Parameters) -> dict[str, Any]:
    return {
        "total": parameters.total,
        "base": parameters.base,
        "trainable": parameters.trainable,
        "by_part": dict(parameters.by_part),
        "by_group": parameters.by_group,
        "groups": [group.summary() for group in parameters.groups],
        "notes": list(parameters.notes),
    }


def _change(change: Change | None) -> dict[str, Any] | None:
    if change is None:
        return None
    return {
        "overrides": list(change.overrides),
        "devices": change.devices,
        "memory_bytes": change.memory.total,
        "host_bytes": change.memory.host,
        "costs": list(change.costs),
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "gpu": asdict(candidate.gpu),
        "placement": candidate.placement.as_dict(),
        "speed": asdict(candidate.speed),
        "cost": asdict(candidate.cost) if candidate.cost else None,
    }


def _length(length: Length | None) -> dict[str, Any] | None:
    if length is None:
        return None
    return {
        "data": asdict(length.data),
        "steps": asdict(length.steps),
        "tokens": length.tokens,
        "supervised_share": length.supervised_share,
    }
