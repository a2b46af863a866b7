"""How long a run is: rows, steps and tokens, from what is known of its data."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.schema import Config
from finetune.planning.steps import Steps, count_steps


@dataclass(frozen=True, slots=True)
class DataCounts:
    """What is known of the data before a run."""

    rows: int
    """Training examples of an epoch."""
    validation_rows: int
    origin: str
    """Where the figures come from, for people."""
    exact: bool
    """Whether the data was prepared. Else lines were counted: nothing is known of lengths, duplicates and what is too long."""
    tokens: int | None = None
    """Of the training examples of an epoch."""
    supervised: int | None = None
    """Those of them that carry loss."""
    longest: int | None = None
    """Tokens of the longest training example."""


@dataclass(frozen=True, slots=True)
class Length:
    """A run of known data."""

    data: DataCounts
    steps: Steps
    tokens: int | None
    """Over all steps; None where lengths are not known."""

    @property
    def supervised_share(self) -> float | None:
        """Of the tokens, those that carry loss."""
        if self.data.supervised is None or not self.data.tokens:
            return None
        return self.data.supervised / self.data.tokens


def length_of(config: Config, data: DataCounts) -> Length:
    """The length of a run of ``config`` over ``data``."""
    steps = count_steps(config, data.rows)
    if data.tokens is None or not data.rows:
        return Length(data, steps, None)
    epochs, rest = divmod(steps.total, steps.per_epoch)
    rows = epochs * data.rows + min(rest * config.train.batch_size, data.rows)
    return Length(data, steps, round(data.tokens * rows / data.rows))
