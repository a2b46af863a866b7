"""`train.samples`: what the model is asked while it trains."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune.config.section import Count, Section


class Samples(Section):
    """Greedy answers of the model as it is, kept in metrics.jsonl and shown while it trains. Training itself is not changed by them."""

    every_steps: Count | None = None
    """Optimizer steps between samples; null: at the end of each epoch."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """What is asked, each a user's turn (the beginning of a text where the tokenizer has no chat template). None: validation rows."""
    rows: Annotated[int, Field(ge=1, le=16)] = 3
    """Validation rows that are asked where there are no `prompts`, each up to the first token that carries loss."""
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 48
    """Longest answer, in tokens."""
