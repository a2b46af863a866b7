"""Checks of the strategy for several devices with what trains and how the base is stored."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.finding import Finding
from finetune.config.schema import Config, EightBit, FourBit, Full, Lora
from finetune.config.tree import KeyPath

_STRATEGY: KeyPath = ("distributed", "strategy")


def strategy(config: Config) -> Iterator[Finding]:
    """What `fsdp` cannot spread, and keys that only it reads."""
    if config.distributed.offload and config.distributed.strategy != "fsdp":
        what = f"`distributed.offload` is for weights that are spread, and `strategy` is {config.distributed.strategy}"
        yield Finding(what, "set `strategy: fsdp`, or remove `offload`", ("distributed", "offload"), _STRATEGY)
    if config.distributed.strategy == "fsdp" and (obstacle := unspreadable(config)):
        why, fix, path = obstacle
        yield Finding(f"`strategy: fsdp` does not compose here: {why}", f"{fix}, or set `strategy: ddp`", _STRATEGY, path)


def unspreadable(config: Config) -> tuple[str, str, KeyPath] | None:
    """Why the base of ``config`` cannot be spread over devices, what to do instead, and the key that says so; None where it can be."""
    tuning, base = config.tuning, config.quantization
    if isinstance(tuning, Full):
        return "it spreads frozen weights, and full tuning freezes none or few", "set `tuning: {method: lora}`", ("tuning", "method")
    if isinstance(base, EightBit):
        return "8-bit weights carry scales that cannot be spread", "set `quantization: {method: nf4}`", ("quantization", "method")
    if isinstance(base, FourBit) and isinstance(tuning, Lora) and tuning.dora:
        return "DoRA reads 4-bit weights in a way that loses their scales once they are spread", "remove `dora`", ("tuning", "dora")
    if config.train.compile:
        return "compiled blocks are not gathered from other devices", "remove `train.compile`", ("train", "compile")
    return None
