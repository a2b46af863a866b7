"""How sure a figure is: bootstrap intervals, and paired comparisons of two systems on the same items.

Every figure is a ratio of sums over items (nats over tokens, right answers over questions), or its exponential. Items that stand or fall
together, such as one fact asked in three wordings, are one cluster: clusters are drawn, never items, because wordings of one fact tell
little more than one of them does. Two systems are always drawn together, so that what is hard for both cancels out.

Intervals are percentile intervals with Hesterberg's correction for small samples (1411.5279, section 3.3): the tails are those of a
Student distribution, widened by k/(k - 1), without which 24 facts cover the truth less often than is claimed. Where every cluster says the
same (0 of 24 right), a resample can say nothing else, so the bound is the binomial one: up to 14 % may still be right.

The p-value is that of the test that swaps the two systems cluster by cluster, which asks nothing of the distribution. A difference is only
claimed where the interval excludes zero and p is below 0.05. Everything is seeded: the same items give the same intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune.evaluation.results import Change

Floats = NDArray[np.float64]
Transform = Literal["none", "exp"]

LEVEL = 0.95
DRAWS = 4000
"""Resamples: the ends of an interval then move by about 3 % of its width from seed to seed."""
FEWEST_CLUSTERS = 6
"""With fewer, no difference can reach p < 0.05 (2 of 32 swaps of five clusters), and an interval would be a guess: none is given."""
_SEED = 20_260_101
_ALL_SWAPS = 12  # clusters up to which every swap is tried
_CELLS = 2**21  # of a matrix of weights held at once: 16 MiB
_WORK = 4 * 10**7  # picks of all resamples of one figure


@dataclass(frozen=True, slots=True, eq=False)
class Quantity:
    """One measured quantity of one system, item by item: the value is ``transform(sum(numerators) / sum(denominators))``."""

    name: str
    """Such as ``all trained facts: answer loss``: what stands before the colon groups figures."""
    unit: str
    """``nats/token``, ``share``, or empty for a plain number."""
    better: str
    """``lower``, ``higher``, or ``same`` where no change is wanted."""
    numerators: Floats
    """(n,)"""
    denominators: Floats
    """(n,), such as tokens; ones for a mean over items."""
    clusters: NDArray[Any]
    """(n,) integers or strings: items with the same one are drawn together."""
    transform: Transform = "none"

    def __post_init__(self) -> None:
        """ValueError where the parts do not belong together, or a cluster has nothing to divide by."""
        if not len(self.numerators) == len(self.denominators) == len(self.clusters) > 0:
            raise ValueError(f"{self.name}: one numerator, denominator and cluster an item, and at least one item")
        if not (np.isfinite(self.numerators).all() and (cluster_sums(self)[:, 1] > 0).all()):
            raise ValueError(f"{self.name}: every numerator must be finite, and every cluster's denominators above zero")

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.numerators)

    @property
    def value(self) -> float:
        """The figure."""
        return float(_transformed(self.transform)(self.numerators.sum() / self.denominators.sum()))


def ratio(
    name: str, unit: str, better: str, parts: tuple[ArrayLike, ArrayLike], clusters: ArrayLike, transform: Transform = "none"
) -> Quantity:
    """A quantity of (numerators, denominators), such as nats and tokens by row."""
    numerators, denominators = (np.asarray(part, dtype=np.float64) for part in parts)
    return Quantity(name, unit, better, numerators, denominators, np.asarray(clusters), transform)


def mean(name: str, unit: str, better: str, values: ArrayLike, clusters: ArrayLike) -> Quantity:
    """The mean of one number an item, such as whether it was answered rightly."""
    numbers = np.asarray(values, dtype=np.float64)
    return ratio(name, unit, better, (numbers, np.ones_like(numbers)), clusters)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one quantity says of several systems."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95 %, by system; none where there are too few clusters."""
    changes: dict[str, Change]
    """Against the first system, by every other one."""


def compare(measured: Mapping[str, Quantity]) -> Comparison:
    """One quantity of several systems, measured on the same items in the same order; the first system is what the others are held against.

    Raises ValueError where the items differ.
    """
    quantities = list(measured.values())
    first = quantities[0]
    if any(not np.array_equal(one.clusters, first.clusters) for one in quantities):
        raise ValueError(f"{first.name}: the systems were measured on different items")
    columns = np.concatenate([cluster_sums(one) for one in quantities], axis=1)  # (k, 2 * systems)
    sums = _resampled(columns, _SEED)
    values = {name: one.value for name, one in measured.items()}
    draws = {name: _values(sums[:, 2 * place : 2 * place + 2], first.transform) for place, name in enumerate(measured)}
    intervals, changes = {}, {}
    for place, (name, one) in enumerate(measured.items()):
        pair = columns[:, [0, 1, 2 * place, 2 * place + 1]]
        if len(columns) >= FEWEST_CLUSTERS:
            intervals[name] = _bounds(draws[name], len(columns), _unanimous(pair[:, 2:], one.unit), (0.0, 1.0))
        if place:
            difference = one.value - first.value
            changes[name] = _change(difference, draws[name] - draws[next(iter(measured))], pair, one)
    return Comparison(values, intervals, changes)


def cluster_sums(quantity: Quantity) -> Floats:
    """(k, 2): numerators and denominators summed over each cluster, clusters in sorted order."""
    _, members = np.unique(quantity.clusters, return_inverse=True)
    parts = [np.bincount(members, weights=part) for part in (quantity.numerators, quantity.denominators)]
    return np.stack(parts, axis=1)


def verdict(change: tuple[float, float] | None, p: float, better: str, clusters: int) -> str:
    """What a difference whose interval is ``change`` says, in words."""
    if change is None or p >= 1 - LEVEL or change[0] <= 0.0 <= change[1]:
        return f"no difference seen with n={clusters}"
    rises = change[0] > 0.0
    if better == "same":
        return "higher" if rises else "lower"
    return "better" if rises == (better == "higher") else "worse"


# --- contrasts: differences of differences, over groups of different items -----------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """A number with its resamples: sums, differences and ratios of such numbers have theirs."""

    value: float
    draws: Floats
    clusters: int
    """Of the smallest group that it rests on."""

    def __sub__(self, other: Sampled) -> Sampled:
        """The difference of two numbers that rest on different items."""
        return self._with(other, np.subtract)

    def over(self, other: Sampled) -> Sampled:
        """The ratio of two numbers; only sensible where ``other`` is surely not zero."""
        return self._with(other, np.divide)

    def times(self, factor: float) -> Sampled:
        """In another unit."""
        return Sampled(self.value * factor, self.draws * factor, self.clusters)

    def _with(self, other: Sampled, operation: Callable[[Any, Any], Any]) -> Sampled:
        shared = min(len(self.draws), len(other.draws))
        draws = operation(self.draws[:shared], other.draws[:shared])
        return Sampled(float(operation(self.value, other.value)), draws, min(self.clusters, other.clusters))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %; None where there are too few clusters."""
        return _bounds(self.draws, self.clusters) if self.clusters >= FEWEST_CLUSTERS else None

    @property
    def p(self) -> float:
        """Two-sided: how often resamples lie on the other side of zero."""
        beyond = min(int((self.draws <= 0).sum()), int((self.draws >= 0).sum()))
        return min(1.0, 2 * (1 + beyond) / (1 + len(self.draws)))


def sampled_change(before: Quantity, after: Quantity, group: int) -> Sampled:
    """The change of a quantity from one system to another; ``group`` numbers the set of items, so that different sets are drawn apart."""
    columns = np.concatenate([cluster_sums(before), cluster_sums(after)], axis=1)
    sums = _resampled(columns, _SEED + 1 + group)
    draws = _values(sums[:, 2:], after.transform) - _values(sums[:, :2], before.transform)
    return Sampled(after.value - before.value, draws, len(columns))


# --- the parts -----------------------------------------------------------------------------------------------------------------------


def _transformed(transform: Transform) -> Callable[[Any], Any]:
    return np.exp if transform == "exp" else np.asarray


def _values(sums: Floats, transform: Transform) -> Floats:
    """(d,) figures of (d, 2) sums."""
    values: Floats = _transformed(transform)(sums[:, 0] / sums[:, 1])
    return values


def _resampled(columns: Floats, seed: int) -> Floats:
    """(d, m): the sums of the (k, m) ``columns`` over k clusters drawn with replacement, d times."""
    generator, k = np.random.default_rng(seed), len(columns)
    draws = min(DRAWS, max(DRAWS // 8, _WORK // k))  # ends of intervals from many clusters are steady enough with fewer resamples
    found = np.empty((draws, columns.shape[1]))
    for part in _parts(draws, k):
        count = part.stop - part.start
        picks = generator.integers(0, k, (count, k)) + np.arange(count)[:, None] * k
        weights = np.bincount(picks.ravel(), minlength=count * k).reshape(count, k)
        found[part] = weights.astype(np.float64) @ columns
    return found


def _parts(count: int, width: int) -> Iterator[slice]:
    """``count`` rows of ``width`` cells in slices of bounded size."""
    rows = max(1, _CELLS // width)
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _bounds(draws: Floats, clusters: int, unanimous: float | None = None, limits: tuple[float, float] = (-1.0, 1.0)) -> tuple[float, float]:
    """The interval of ``draws``; of a share on which all clusters agree (``unanimous``), what may be true of others, within ``limits``."""
    if unanimous is not None:
        other = 1 - ((1 - LEVEL) / 2) ** (1 / clusters)  # share of clusters that may differ though none was seen (Clopper-Pearson)
        low, high = limits
        return unanimous - other * (unanimous - low), unanimous + other * (high - unanimous)
    student = _student(clusters - 1)
    tail = NormalDist().cdf(-math.sqrt(clusters / (clusters - 1)) * student)
    ends = np.quantile(draws, [tail, 1 - tail])
    return float(ends[0]), float(ends[1])


def _student(freedom: int) -> float:
    """The upper 2.5 % point of Student's distribution, by its expansion in 1/freedom (Abramowitz and Stegun 26.7.5); 5 or more."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))


def _unanimous(sums: Floats, unit: str) -> float | None:
    """The share that every cluster of (k, 2) ``sums`` has; None where they differ, or it is no share."""
    shares = sums[:, 0] / sums[:, 1]
    return float(shares[0]) if unit == "share" and np.ptp(shares) == 0 else None


def _change(difference: float, draws: Floats, pair: Floats, quantity: Quantity) -> Change:
    """The change that (k, 4) sums of both systems show."""
    clusters = len(pair)
    if clusters < FEWEST_CLUSTERS:
        return Change(difference, None, None, None, verdict(None, 1.0, quantity.better, clusters))
    first, second = pair[:, 0] / pair[:, 1], pair[:, 2] / pair[:, 3]
    same = quantity.unit == "share" and np.ptp(second - first) == 0
    bounds = _bounds(draws, clusters, float(second[0] - first[0]) if same else None)
    p = _swap_test(pair, quantity.transform)
    return Change(difference, *bounds, p, verdict(bounds, p, quantity.better, clusters))


def _swap_test(pair: Floats, transform: Transform) -> float:
    """Two-sided p: how often swapping the systems cluster by cluster gives a difference as large as the one seen."""
    totals, gaps = pair.sum(0), pair[:, 2:] - pair[:, :2]
    seen = _swapped(totals, np.zeros((1, 2)), transform)[0]
    reached, tried = 0, 0
    for swaps in _swaps(len(pair)):
        differences = _swapped(totals, swaps.astype(np.float64) @ gaps, transform)
        reached += int((np.abs(differences) >= abs(seen) * (1 - 1e-9)).sum())
        tried += len(swaps)
    exact = len(pair) <= _ALL_SWAPS
    return reached / tried if exact else (1 + reached) / (1 + tried)


def _swapped(totals: Floats, moved: Floats, transform: Transform) -> Floats:
    """(d,) differences where (d, 2) ``moved`` of the gaps changed sides."""
    return _values(totals[2:] - moved, transform) - _values(totals[:2] + moved, transform)


def _swaps(k: int) -> Iterator[NDArray[np.int8]]:
    """(d, k) of 0 and 1: every way to swap where they are few, else seeded ones."""
    if k <= _ALL_SWAPS:
        yield ((np.arange(2**k)[:, None] >> np.arange(k)) & 1).astype(np.int8)
        return
    generator = np.random.default_rng(_SEED)
    for part in _parts(min(DRAWS, max(DRAWS // 8, _WORK // k)), k):
        yield generator.integers(0, 2, (part.stop - part.start, k), dtype=np.int8)
