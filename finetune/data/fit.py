"""How well data.max_tokens fits the data: how many rows come near it, what would do, and which of them are longer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.report import DataReport

Lengths = npt.NDArray[np.int32]  # (n,) tokens of each example

SHARES = (0.5, 0.75, 0.9)
_STEP = 64


@dataclass(frozen=True, slots=True)
class Fit:
    """The lengths of one side against data.max_tokens."""

    max_tokens: int
    longest: int
    """Tokens of the longest conversation before anything was cut, or of the longest block where there are documents only."""
    above: dict[str, float]
    """Share of the examples with more than 50 %, 75 % and 90 % of max_tokens, and with all of it."""
    over_long: float
    """Share of the rows that were read which did not fit."""
    suggested: int
    """The smallest multiple of 64 (or max_tokens itself) that holds every conversation whole; documents are cut into blocks anyway."""

    @property
    def fits(self) -> bool:
        """Whether max_tokens holds every conversation and is no larger than it has to be for that."""
        return self.longest <= self.max_tokens < self.longest + _STEP

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def fit(lengths: Lengths, report: DataReport) -> Fit:
    """``lengths`` (at least one) of the training examples against the limit of ``report``."""
    limit = report.max_tokens
    longest = max(source.longest_row for source in report.sources) or int(lengths.max())
    rounded = -(-longest // _STEP) * _STEP
    rows, over_long = sum(source.rows for source in report.sources), sum(source.over_long for source in report.sources)
    above = {f"{share:.0%}": float(np.mean(lengths > share * limit)) for share in SHARES}
    return Fit(
        max_tokens=limit,
        longest=longest,
        above=above | {"100%": float(np.mean(lengths >= limit))},
        over_long=over_long / rows if rows else 0.0,
        suggested=rounded if longest > limit else min(limit, rounded),
    )


def histogram(lengths: Lengths, bins: int) -> list[tuple[int, int, int]]:
    """(first length, last length, examples) of at most ``bins`` equal stretches over ``lengths`` (at least one)."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // bins))
    low -= low % width  # bounds that can be read: multiples of the width
    counts = np.bincount((lengths - low) // width)
    return [(low + width * number, low + width * (number + 1) - 1, int(count)) for number, count in enumerate(counts)]
