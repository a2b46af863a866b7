"""Checks of the learning rate's course over the run."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.finding import Finding
from finetune.config.schema import Config


def warmup(config: Config) -> Iterator[Finding]:
    """Two lengths of one warm-up, and warm-ups that are all there is."""
    schedule, most = config.schedule, config.train.max_steps
    if schedule.warmup_ratio is not None and schedule.warmup_steps is not None:
        yield Finding(
            "`schedule` has both `warmup_ratio` and `warmup_steps`",
            "keep one of the two (a preset's value is removed with `null`)",
            ("schedule", "warmup_steps"),
            ("schedule", "warmup_ratio"),
        )
    if most is not None and schedule.warmup_steps is not None and schedule.warmup_steps >= most:
        yield Finding(
            f"the run ends after {most} steps, inside the warm-up of {schedule.warmup_steps}",
            "lower `warmup_steps`, or use `warmup_ratio: 0.03`",
            ("schedule", "warmup_steps"),
            ("train", "max_steps"),
        )
    if schedule.warmup_ratio == 1:
        yield Finding("the whole run would be warm-up", "0.03 to 0.1 is usual", ("schedule", "warmup_ratio"))


def decay(config: Config) -> Iterator[Finding]:
    """A floor that a constant schedule never reaches."""
    if config.schedule.method == "constant" and config.schedule.min_lr_ratio:
        yield Finding(
            "a constant schedule never reaches `min_lr_ratio`",
            "remove it, or set `method: cosine`",
            ("schedule", "min_lr_ratio"),
            ("schedule", "method"),
        )
