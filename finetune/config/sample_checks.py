"""Checks of `train.samples`: that there is something to ask, and no key that would not be read."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.finding import Finding
from finetune.config.samples import Samples
from finetune.config.schema import Config


def samples(config: Config) -> Iterator[Finding]:
    """Samples without prompts need validation rows, and `rows` is for those alone."""
    asked = config.train.samples
    if asked is None:
        return
    if not asked.prompts and config.data.validation is None:
        yield Finding(
            "there is nothing to ask: `train.samples` has no `prompts`, and there is no validation data to take some from",
            "add `prompts: [What is ...?]`, or `validation: {fraction: 0.02}` under `data`",
            ("train", "samples"),
            ("data", "validation"),
        )
    if asked.prompts and asked.rows != Samples.model_fields["rows"].default:
        yield Finding(
            "`rows` counts validation rows, which are not asked where there are `prompts`",
            "remove one of the two",
            ("train", "samples", "rows"),
            ("train", "samples", "prompts"),
        )
