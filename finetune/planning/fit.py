"""Whether a run fits in a device's memory, and the smallest change that makes it fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from finetune.config.checks import check
from finetune.config.methods import facts
from finetune.config.schema import Config, FourBit, Lora, NoQuantization, Prefix, TiedLora
from finetune.planning.memory import Memory, Setting, estimate_memory
from finetune.planning.parameters import Parameters, count_parameters
from finetune.planning.shapes import ModelShape

_LEAST_RANK = 4
_MOST_DEVICES = 8
# What ways cost, where halving the micro-batch costs 1: what takes time alone comes to 18 at most, and goes before all else.
_CHECKPOINTING, _OFFLOADED, _NARROW_STATES = 2.5, 3.0, 3.5
_RANK, _NARROW_BASE = 20.0, 25.0
_DEVICES, _OFFLOAD = 75.0, 12.5
_NARROW_TRAINED = 1000.0
"""More than all others together."""

MARGIN = 0.02
"""Share of a device that a proposal leaves free: half a GiB of 24, about what a display or another process takes there. Whoever follows a
proposal should not meet a tie. Assumed, not measured."""
_SMALLER_STATES = {
    "adamw": "paged-adamw-8bit",
    "paged-adamw-32bit": "paged-adamw-8bit",
    "adamw-8bit": "paged-adamw-8bit",
    "lion": "lion-8bit",
}


@dataclass(frozen=True, slots=True)
class Device:
    """What a run has to fit in."""

    usable_bytes: int
    """Of one device, for one process."""
    most: int = _MOST_DEVICES
    """Devices that may be proposed."""


@dataclass(frozen=True, slots=True)
class Change:
    """What makes a run fit."""

    overrides: tuple[str, ...]
    """Ready for `-o`; empty where more devices are enough."""
    devices: int
    """How many there must be in all."""
    memory: Memory
    """Of one device then."""
    costs: tuple[str, ...]
    """What each part of the change costs, for people."""


@dataclass(frozen=True, slots=True)
class _Option:
    """One way to set one thing."""

    weight: float = 0.0
    """What it costs the user, by which ways are ordered."""
    cost: str = ""
    overrides: tuple[str, ...] = ()
    setting: dict[str, Any] = field(default_factory=dict)
    """Fields of `Setting` that become others."""
    sections: dict[str, Any] = field(default_factory=dict)
    """Sections of the configuration that do."""


def fits(memory: Memory, usable_bytes: int) -> bool:
    """Whether ``memory`` lies within what one device has for it, once all has given way that can."""
    return memory.firm <= usable_bytes


def fits_with_room(memory: Memory, usable_bytes: int) -> bool:
    """Whether ``memory`` leaves the part of a device free that anything proposed has to leave."""
    return fits(memory, math.floor((1 - MARGIN) * usable_bytes))


def smallest_change(shape: ModelShape, config: Config, setting: Setting, device: Device, longest: int) -> Change | None:
    """The change of least cost to the user after which ``config`` fits on ``device``; None where none does, or it fits already.

    ``longest`` is the longest example in tokens, which a micro-batch must hold. The order of costs: smaller micro-batches, checkpointing
    and states of 8 bits take time alone; a smaller rank learns less; a 4-bit base blurs what is known; more devices cost money; trained
    weights in bf16 lose what is learned, and come where nothing else helps. Ways that the checks of a configuration refuse are left out,
    and so are those that fit with less than `MARGIN` to spare.
    """
    counted: dict[str, Parameters] = {}

    def needed(changed: Config, decided: Setting) -> Memory:
        key = repr(changed.tuning)
        if key not in counted:
            counted[key] = count_parameters(shape, changed)
        return estimate_memory(shape, counted[key], changed, decided)

    if fits(needed(config, setting), device.usable_bytes):
        return None
    for ways in _ordered(config, setting, device, longest):
        changed = config.model_copy(update={name: value for way in ways for name, value in way.sections.items()})
        decided = replace(setting, **{name: value for way in ways for name, value in way.setting.items()})
        memory = needed(changed, decided)
        if fits_with_room(memory, device.usable_bytes) and not check(changed):
            return Change(
                overrides=(*(override for way in ways for override in way.overrides), *_stated_tokens(config, setting, decided)),
                devices=decided.world,
                memory=memory,
                costs=tuple(way.cost for way in ways if way.cost),
            )
    return None


def _ordered(config: Config, setting: Setting, device: Device, longest: int) -> Iterator[tuple[_Option, ...]]:
    """Every combination, the cheapest first; of equally cheap ones that with fewer changes."""
    things = (
        _tokens(setting, longest),
        _checkpointing(config, setting),
        _optimizers(setting),
        _ranks(config),
        _types(config),
        _bases(config),
        _devices(config, setting, device),
    )
    combinations = itertools.product(*(([_Option(), *others]) for others in things))
    changing = ([way for way in ways if way.weight] for ways in combinations)
    yield from (tuple(ways) for ways in sorted(changing, key=lambda ways: (sum(way.weight for way in ways), len(ways))) if ways)


def _tokens(setting: Setting, longest: int) -> Iterator[_Option]:
    tokens, weight = setting.tokens, 0
    while tokens > longest:
        tokens, weight = max(longest, tokens // 2), weight + 1
        yield _Option(
            weight, f"micro-batches of {tokens} tokens: the same result, slower", (f"train.tokens_per_device={tokens}",), {"tokens": tokens}
        )


def _stated_tokens(config: Config, setting: Setting, decided: Setting) -> tuple[str, ...]:
    """The size of the micro-batch where `auto` would take another one: it is measured on one device, and a rule once the base is spread."""
    spread = setting.kind == "cuda" and decided.strategy != setting.strategy
    left_open = config.train.tokens_per_device == "auto" and decided.tokens == setting.tokens  # else `_tokens` states it
    return (f"train.tokens_per_device={decided.tokens}",) if spread and left_open else ()


def _checkpointing(config: Config, setting: Setting) -> Iterator[_Option]:
    if isinstance(config.tuning, Prefix):
        return
    again = "activations are computed again: the same result, a third slower"
    if not setting.checkpointing:
        yield _Option(_CHECKPOINTING, again, ("train.gradient_checkpointing=true",), {"checkpointing": True})
    if not setting.offload and setting.kind == "cuda" and not config.train.compile:  # which does not compose with it
        cost = ("" if setting.checkpointing else f"{again}; ") + "hidden states wait in host memory: the same result, slower"
        override = ("train.gradient_checkpointing=offload",)
        yield _Option(_OFFLOADED, cost, override, {"checkpointing": True, "offload": True})


def _optimizers(setting: Setting) -> Iterator[_Option]:
    smaller = _SMALLER_STATES.get(setting.optimizer)
    if smaller is not None and setting.kind == "cuda":
        cost = f"{smaller}: states rounded to 8 bits"
        yield _Option(_NARROW_STATES, cost, (f"optimizer.method={smaller}",), {"optimizer": smaller})


def _ranks(config: Config) -> Iterator[_Option]:
    """Alpha follows in proportion: the scale of the update stays, or is what presets give that rank (rslora)."""
    tuning, weight = config.tuning, 0.0
    if not isinstance(tuning, Lora | TiedLora):
        return
    rank = tuning.rank
    while rank > _LEAST_RANK:
        rank, weight = max(_LEAST_RANK, rank // 2), weight + _RANK
        alpha = round(tuning.alpha * rank / tuning.rank, 3)
        yield _Option(
            weight,
            f"rank {rank} instead of {tuning.rank}: less can be learned",
            (f"tuning.rank={rank}", f"tuning.alpha={alpha:g}"),
            sections={"tuning": tuning.model_copy(update={"rank": rank, "alpha": alpha})},
        )


def _types(config: Config) -> Iterator[_Option]:
    if config.train.trainable_dtype == "fp32" and config.optimizer.method != "galore":
        cost = "trained weights in bf16: small updates are rounded away"
        narrow = config.train.model_copy(update={"trainable_dtype": "bf16"})
        yield _Option(_NARROW_TRAINED, cost, ("train.trainable_dtype=bf16",), sections={"train": narrow})


def _bases(config: Config) -> Iterator[_Option]:
    if config.quantization.method != "nf4" and "nf4" in facts(config.tuning).quantized:
        cost = "a 4-bit base: a relative weight error of 0.09, which LoftQ halves"
        wider = isinstance(config.quantization, NoQuantization)
        weight = _NARROW_BASE if wider else 0.9 * _NARROW_BASE
        yield _Option(weight, cost, ("quantization.method=nf4",), sections={"quantization": FourBit(method="nf4")})


def _devices(config: Config, setting: Setting, device: Device) -> Iterator[_Option]:
    """Weights spread over more devices; copies of the model on each would not help."""
    count, weight = setting.world, 0.0
    while 2 * count <= device.most:
        count, weight = 2 * count, weight + _DEVICES
        for offload in (False, True) if setting.kind == "cuda" else (False,):
            spread = config.distributed.model_copy(update={"strategy": "fsdp", "offload": offload})
            yield _Option(
                weight + _OFFLOAD * offload,
                f"{count} devices, the base spread over them" + (" and kept in host memory: slow" if offload else ""),
                ("distributed.strategy=fsdp", *(("distributed.offload=true",) if offload else ())),
                {"world": count, "strategy": "fsdp"},
                {"distributed": spread},
            )
