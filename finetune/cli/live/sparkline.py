"""A curve in one line of text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN = "_.-~=+*#"
"""For terminals whose encoding has no blocks."""
_LIMIT = 1024
_STEEP = 0.95
"""Share of the values that the scale spans: the first, large losses would flatten all that follows."""


class Trace:
    """Values over a run of any length, in bounded memory: where there are too many, neighbours become their mean."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._pending: list[float] = []
        self._each = 1

    def add(self, value: float) -> None:
        """Append one value."""
        self._pending.append(value)
        if len(self._pending) == self._each:
            self._means.append(_mean(self._pending))
            self._pending = []
        if len(self._means) == _LIMIT:
            self._means = [_mean(self._means[start : start + 2]) for start in range(0, _LIMIT, 2)]
            self._each *= 2

    def points(self, most: int) -> list[float]:
        """The curve as at most ``most`` values, the oldest first."""
        pending = list(self._pending)  # another thread may be adding
        values = [*self._means, _mean(pending)] if pending else list(self._means)
        if len(values) <= most:
            return values
        edges = [round(number * len(values) / most) for number in range(most + 1)]
        return [_mean(values[start:end]) for start, end in pairwise(edges)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sparkline(values: Sequence[float], marks: str = BLOCKS) -> str:
    """One mark a value, between the lowest and nearly the highest; what is higher is drawn as high as can be."""
    if not values:
        return ""
    low, high = min(values), sorted(values)[round(_STEEP * (len(values) - 1))]
    if high <= low:
        high = max(values)
    span = (high - low) or 1.0
    top = len(marks) - 1
    return "".join(marks[min(top, round((value - low) / span * top))] for value in values)
