"""Checks of compiled blocks with what else happens to a block."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.finding import Finding
from finetune.config.schema import Config


def compiled(config: Config) -> Iterator[Finding]:
    """Hidden states that would leave the device inside of a compiled block."""
    if config.train.compile and config.train.gradient_checkpointing == "offload":
        what = "`train.compile` makes one kernel of a block and its checkpoint, and `offload` moves what lies between them"
        yield Finding(
            what, "set `gradient_checkpointing: true`, or remove `compile`", ("train", "compile"), ("train", "gradient_checkpointing")
        )
