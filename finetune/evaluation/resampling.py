"""Resamples of clusters, the ends of intervals that follow from them, and what no resample can show.

Intervals are percentile intervals with Hesterberg's correction for small samples (1411.5279, section 3.3): the tails are those of a
Student distribution, widened by k/(k - 1), without which 24 facts cover the truth less often than is claimed. Where every cluster says the
same (0 of 24 right), a resample can say nothing else, so the bound is the binomial one: up to 14 % may still be right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]

LEVEL = 0.95
DRAWS = 4000
"""Resamples: the ends of an interval then move by about 3 % of its width from seed to seed."""
FEWEST_CLUSTERS = 6
"""With fewer, no difference can reach p < 0.05 (2 of 32 swaps of five clusters), and an interval would be a guess: none is given."""
NORMAL = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Standard errors in half of an interval."""
_CELLS = 2**21  # of a matrix of weights held at once: 16 MiB
_WORK = 4 * 10**7  # picks of all resamples of one figure


def resampled(columns: Floats, seed: int) -> Floats:
    """(d, m): the sums of the (k, m) ``columns`` over k clusters drawn with replacement, d times."""
    generator, k = np.random.default_rng(seed), len(columns)
    draws = count_for(k)
    found = np.empty((draws, columns.shape[1]))
    for part in parts(draws, k):
        count = part.stop - part.start
        picks = generator.integers(0, k, (count, k)) + np.arange(count)[:, None] * k
        weights = np.bincount(picks.ravel(), minlength=count * k).reshape(count, k)
        found[part] = weights.astype(np.float64) @ columns
    return found


def count_for(k: int) -> int:
    """How many resamples of ``k`` clusters: ends of intervals from many of them are steady enough with fewer."""
    return min(DRAWS, max(DRAWS // 8, _WORK // k))


def parts(count: int, width: int) -> Iterator[slice]:
    """``count`` rows of ``width`` cells in slices of bounded size."""
    rows = max(1, _CELLS // width)
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def bounds(draws: Floats, clusters: int) -> Interval:
    """The interval that ``draws`` show."""
    tail = NormalDist().cdf(-math.sqrt(clusters / (clusters - 1)) * student(clusters - 1))
    ends = np.quantile(draws, [tail, 1 - tail])
    return float(ends[0]), float(ends[1])


def student(freedom: int) -> float:
    """The upper 2.5 % point of Student's distribution, by its expansion in 1/freedom (Abramowitz and Stegun 26.7.5); 5 or more."""
    z = NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))


# --- what no resample can show -------------------------------------------------------------------------------------------------------


def agreed(values: Floats, unit: str) -> float | None:
    """The share, or the change of a share, that all clusters have in ``values`` (k,); None where they differ, or it is no share."""
    return float(values[0]) if unit == "share" and np.ptp(values) < 1e-9 else None


def hidden(value: float, clusters: int, limits: Interval) -> Interval:
    """How far below and above ``value``, on which all clusters agree, the truth may lie, within ``limits`` (Clopper and Pearson)."""
    differing = 1 - ((1 - LEVEL) / 2) ** (1 / clusters)  # share of clusters that may be otherwise though none was seen
    return differing * (value - limits[0]), differing * (limits[1] - value)
