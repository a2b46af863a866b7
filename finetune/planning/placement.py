"""A run on devices of one kind: what is decided there, what each device must hold, and whether it does."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any

from finetune.config.schema import Config
from finetune.errors import ConfigError, HardwareError
from finetune.hardware import Machine
from finetune.planning.checkpointing import Sizes
from finetune.planning.fit import fits
from finetune.planning.gpus import BY_SIZE, Gpu, gpu_of
from finetune.planning.length import DataCounts
from finetune.planning.memory import Memory, Setting, estimate_memory, floor_memory, setting_of
from finetune.planning.parameters import Parameters
from finetune.planning.resolve import Choice, Resolved, resolve
from finetune.planning.shapes import ModelShape
from finetune.planning.strategy import Crowd, Weights

MOST_TOKENS = 32768
"""Of a micro-batch whose size is measured on the GPU (`finetune.training.probe`)."""
_USUAL_EXAMPLE = 512
"""Tokens of an example where nothing is known of the data."""
_GRAIN = 64
_SIZES = f"use one of {', '.join(map(str, BY_SIZE))}"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planned, wherever it will run."""

    config: Config
    shape: ModelShape
    parameters: Parameters
    data: DataCounts | None
    crowd: Crowd
    """The processes that train together, one a device; their weights are those of ``shape``."""
    resolved: Resolved | None
    """What was decided already, where a run has done so."""

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.crowd.world

    @property
    def longest(self) -> int:
        """Tokens of the longest example, or the most that it may have."""
        return (self.data.longest if self.data else None) or self.config.data.max_tokens

    @property
    def example_tokens(self) -> int:
        """Tokens of a usual example."""
        if self.data and self.data.tokens and self.data.rows:
            return max(1, round(self.data.tokens / self.data.rows))
        return min(_USUAL_EXAMPLE, self.config.data.max_tokens)


@dataclass(frozen=True, slots=True)
class Placement:
    """A subject on one machine."""

    machine: Machine
    resolved: Resolved
    setting: Setting
    memory: Memory
    """Of one process at the peak of a step."""
    floor: Memory
    """What no micro-batch goes below."""
    copies: int
    """Processes that share the device's memory: all of them on a CPU, one on a GPU."""

    @property
    def needs(self) -> int:
        """Bytes of a device's memory."""
        return self.memory.total * self.copies

    @property
    def claims(self) -> int:
        """Of these, what the system does not take back where memory is short: all but pages of the checkpoint's file."""
        return (self.memory.total - self.memory.parts.get("mapped", 0)) * self.copies

    @property
    def fits(self) -> bool:
        """Whether the device has them."""
        return fits(self.memory, self.room)

    @property
    def limit(self) -> int:
        """Tokens that micro-batches may have (`train.tokens_per_device`); the memory is that of ``setting.tokens``, which they do have."""
        return self.resolved.tokens_per_device.value

    @property
    def room(self) -> int:
        """Bytes of a device's memory for one process."""
        return self.machine.memory_bytes // self.copies

    @property
    def least(self) -> int:
        """Bytes that no setting of the micro-batch goes below. Processes on one CPU may share what they map from the model's file."""
        shared = self.floor.parts["base"] + self.floor.parts["embeddings"]
        return shared + (self.floor.total - shared) * self.copies

    def is_hopeless(self, swap_bytes: int = 0) -> bool:
        """Whether not even the smallest micro-batch can fit, whatever is estimated rightly or wrongly."""
        return self.least > self.machine.memory_bytes + swap_bytes

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: bytes, and the size of the micro-batch."""
        return {
            "name": self.machine.name,
            "kind": self.machine.kind,
            "devices": self.setting.world,
            "memory_bytes": self.machine.memory_bytes,
            "needs_bytes": self.needs,
            "floor_bytes": self.least,
            "host_bytes": self.memory.host,
            "fits": self.fits,
            "tokens_per_device": self.setting.tokens,
            "strategy": self.setting.strategy,
        }


def machine_of(gpu: Gpu, devices: int = 1) -> Machine:
    """A machine with ``devices`` of a listed GPU."""
    return Machine("cuda", gpu.name, devices, gpu.usable_bytes, bf16=True)


def size_of(text: str) -> int:
    """The gigabytes that a user means by ``text``, such as `48`, `48GB` or `48 GiB`; ConfigError where it is no number of them."""
    found = re.fullmatch(r"(\d{1,6}) ?(?:gi?b?)?", text.strip(), re.ASCII | re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{text!r} is no number of gigabytes", where=f"--gpu {text}", fix=_SIZES)
    return int(found[1])


def machine_of_size(gigabytes: int, devices: int = 1) -> Machine:
    """A machine with ``devices`` of the GPU that is meant by a number of gigabytes; ConfigError for one that is not listed."""
    if gigabytes not in BY_SIZE:
        raise ConfigError(f"no common GPU has {gigabytes} GB", where=f"--gpu {gigabytes}", fix=_SIZES)
    return machine_of(gpu_of(BY_SIZE[gigabytes]), devices)


def place(subject: Subject, machine: Machine) -> Placement:
    """Decide what is open for ``machine``, and estimate.

    ConfigError or HardwareError where the configuration asks for what such a machine lacks.
    """
    shape, config = subject.shape, subject.config
    copies = subject.crowd.on_this_machine if machine.kind == "cpu" else 1
    crowd = replace(subject.crowd, weights=Weights(shape.blocks_scalars, shape.other_scalars))
    resolved = subject.resolved or resolve(config, machine, crowd, Sizes(shape, subject.parameters, subject.longest))
    require_gpu_to_offload(resolved, machine.kind)
    threads = max(1, _cores(machine) // copies) if machine.kind == "cpu" else 1
    setting = setting_of(resolved, machine.kind, world=subject.world, threads=threads, example_tokens=subject.example_tokens)
    is_open = subject.resolved is None and config.train.tokens_per_device == "auto"
    if is_open and machine.kind == "cuda" and setting.strategy == "ddp":
        limit = _largest(subject, setting, machine.memory_bytes)
        reason = "more is no faster" if limit == MOST_TOKENS else f"about what {machine.memory_bytes / 2**30:.0f} GiB hold"
        resolved = replace(resolved, tokens_per_device=Choice(limit, f"{reason}; measured before the first step"))
    else:
        limit = setting.tokens
    # no micro-batch has more than the whole batch, and one example is never cut
    tokens = min(max(limit, subject.longest), config.train.batch_size * subject.longest)
    setting = replace(setting, tokens=tokens, example_tokens=min(setting.example_tokens, tokens))
    memory = estimate_memory(shape, subject.parameters, config, setting)
    if is_open and not fits(memory, machine.memory_bytes // copies):
        resolved = replace(resolved, tokens_per_device=Choice(limit, "one example of data.max_tokens must fit"))
    return Placement(
        machine, _with_host(resolved, memory), setting, memory, floor_memory(shape, subject.parameters, config, setting), copies
    )


def require_gpu_to_offload(resolved: Resolved, kind: str) -> None:
    """HardwareError for hidden states that are to leave a device of another ``kind`` than `cuda`."""
    if resolved.gradient_checkpointing.value == "offload" and kind != "cuda":
        raise HardwareError(
            "`offload` moves activations from the memory of a GPU to that of its host, and there is no GPU here",
            where="train.gradient_checkpointing",
            fix="set it to auto (off on a CPU) or true; finetune plan CONFIG --gpu 48 plans for a GPU",
        )


def _with_host(resolved: Resolved, memory: Memory) -> Resolved:
    """``resolved``, which says how much host memory hidden states take."""
    if not memory.host:
        return resolved
    choice = resolved.gradient_checkpointing
    reason = f"offload, {memory.host / 2**30:.1f} GiB of host memory; {choice.reason}"
    return replace(resolved, gradient_checkpointing=replace(choice, reason=reason))


def _cores(machine: Machine) -> int:
    """Threads of torch on this CPU."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdigit() and int(stated) else machine.devices


def _largest(subject: Subject, setting: Setting, room: int) -> int:
    """Tokens of the largest micro-batch that fits, as the measurement on the device would find; one example where none does."""
    least = subject.longest
    most = max(least, MOST_TOKENS)

    def holds(tokens: int) -> bool:
        tried = replace(setting, tokens=tokens, example_tokens=min(setting.example_tokens, tokens))
        return estimate_memory(subject.shape, subject.parameters, subject.config, tried).total <= room  # with room for all states

    while most - least > _GRAIN:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if holds(middle) else (least, middle)
    return most if holds(most) else least
