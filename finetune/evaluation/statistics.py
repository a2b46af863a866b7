"""How sure a figure is: bootstrap intervals, and paired comparisons of two systems on the same items.

Every figure is a ratio of sums over items (nats over tokens, right answers over questions), or its exponential. Items that stand or fall
together, such as one fact asked in three wordings, are one cluster: clusters are drawn, never items, because wordings of one fact tell
little more than one of them does. Two systems are always drawn together, so that what is hard for both cancels out.

Intervals are percentile intervals, corrected for small samples; where every cluster says the same, the bound is the binomial one
(`resampling`). A contrast of several groups adds such bounds to what its resamples show as independent errors are added, each end for
itself (Zou and Donner 2008, doi 10.1002/sim.3095): a group that agrees is no group that is known exactly.

The p-value is that of the test that swaps the two systems cluster by cluster, which asks nothing of the distribution. A difference is only
claimed where the interval excludes zero and p is below 0.05. Everything is seeded: the same items give the same intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune.evaluation.resampling import (
    FEWEST_CLUSTERS,
    LEVEL,
    NORMAL,
    Floats,
    Interval,
    agreed,
    bounds,
    count_for,
    hidden,
    parts,
    resampled,
)
from finetune.evaluation.results import Change

Transform = Literal["none", "exp"]

_SEED = 20_260_101
_ALL_SWAPS = 12  # clusters up to which every swap is tried
_SHARES, _CHANGES = (0.0, 1.0), (-1.0, 1.0)
"""Where a share, and a change of one, can lie."""


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
    """By every system but the first: of a trained one against its base, of any other against the first."""
    between: dict[str, Change]
    """By every trained system but the first of them: against that one."""


def compare(measured: Mapping[str, Quantity], bases: Mapping[str, str] = MappingProxyType({})) -> Comparison:
    """One quantity of several systems, measured on the same items in the same order; ``bases``: what each trained one was trained from.

    Raises ValueError where the items differ.
    """
    names, first = list(measured), next(iter(measured.values()))
    if any(not np.array_equal(one.clusters, first.clusters) for one in measured.values()):
        raise ValueError(f"{first.name}: the systems were measured on different items")
    sums = {name: cluster_sums(one) for name, one in measured.items()}
    drawn = resampled(np.concatenate(list(sums.values()), axis=1), _SEED)  # (d, 2 * systems)
    draws = {name: _values(drawn[:, 2 * place : 2 * place + 2], first.transform) for place, name in enumerate(names)}

    def against(name: str, other: str) -> Change:
        pair = np.concatenate([sums[other], sums[name]], axis=1)
        return _change(measured[name].value - measured[other].value, draws[name] - draws[other], pair, measured[name])

    trained = [name for name in names if name in bases]
    return Comparison(
        values={name: one.value for name, one in measured.items()},
        intervals={name: _interval(draws[name], sums[name], one) for name, one in measured.items() if len(sums[name]) >= FEWEST_CLUSTERS},
        changes={name: against(name, bases.get(name, names[0])) for name in names[1:]},
        between={name: against(name, trained[0]) for name in trained[1:]},
    )


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
    below: float = 0.0
    """How far under the value the truth may lie though no resample shows it: of shares on which all clusters of a group agree."""
    above: float = 0.0
    """The same over the value."""

    def __sub__(self, other: Sampled) -> Sampled:
        """The difference of two numbers that rest on different items, or on the same ones drawn alike."""
        return self._with(other, np.subtract, (math.hypot(self.below, other.above), math.hypot(self.above, other.below)))

    def over(self, other: Sampled) -> Sampled:
        """The ratio of two numbers; only sensible where ``other`` is surely not zero."""
        moved = self.times(1 / other.value) - other.times(self.value / other.value**2)  # the ratio's differential
        return self._with(other, np.divide, (moved.below, moved.above))

    def times(self, factor: float) -> Sampled:
        """In another unit."""
        ends = (self.below, self.above) if factor >= 0 else (self.above, self.below)
        return Sampled(self.value * factor, self.draws * factor, self.clusters, *(abs(factor) * end for end in ends))

    def _with(self, other: Sampled, operation: Callable[[Any, Any], Any], unseen: Interval) -> Sampled:
        shared = min(len(self.draws), len(other.draws))
        draws = operation(self.draws[:shared], other.draws[:shared])
        return Sampled(float(operation(self.value, other.value)), draws, min(self.clusters, other.clusters), *unseen)

    @property
    def interval(self) -> Interval | None:
        """95 %; None where there are too few clusters."""
        if self.clusters < FEWEST_CLUSTERS:
            return None
        low, high = bounds(self.draws, self.clusters)
        if self.below:
            low = self.value - math.hypot(max(0.0, self.value - low), self.below)
        if self.above:
            high = self.value + math.hypot(max(0.0, high - self.value), self.above)
        return low, high

    @property
    def p(self) -> float:
        """Two-sided: how often resamples lie on the other side of zero; no less than the interval says where they do not show all of it."""
        beyond = min(int((self.draws <= 0).sum()), int((self.draws >= 0).sum()))
        counted = min(1.0, 2 * (1 + beyond) / (1 + len(self.draws)))
        if self.interval is None or not (self.below or self.above):
            return counted
        room = self.value - self.interval[0] if self.value > 0 else self.interval[1] - self.value
        return max(counted, 2 * NormalDist().cdf(-NORMAL * abs(self.value) / room)) if room else counted


def sampled_change(before: Quantity, after: Quantity, group: int) -> Sampled:
    """The change of a quantity from one system to another; ``group`` numbers the set of items, so that different sets are drawn apart."""
    columns = np.concatenate([cluster_sums(before), cluster_sums(after)], axis=1)
    sums = resampled(columns, _SEED + 1 + group)
    draws = _values(sums[:, 2:], after.transform) - _values(sums[:, :2], before.transform)
    same = _agreed_change(columns, before.unit)
    unseen = (0.0, 0.0) if same is None else hidden(same, len(columns), _CHANGES)
    return Sampled(after.value - before.value, draws, len(columns), *unseen)


# --- the parts -----------------------------------------------------------------------------------------------------------------------


def _transformed(transform: Transform) -> Callable[[Any], Any]:
    return np.exp if transform == "exp" else np.asarray


def _values(sums: Floats, transform: Transform) -> Floats:
    """(d,) figures of (d, 2) sums."""
    values: Floats = _transformed(transform)(sums[:, 0] / sums[:, 1])
    return values


def _interval(draws: Floats, sums: Floats, quantity: Quantity) -> Interval:
    """Of the figure that (k, 2) ``sums`` make."""
    same = agreed(sums[:, 0] / sums[:, 1], quantity.unit)
    return bounds(draws, len(sums)) if same is None else _around(same, len(sums), _SHARES)


def _around(value: float, clusters: int, limits: Interval) -> Interval:
    below, above = hidden(value, clusters, limits)
    return value - below, value + above


def _agreed_change(pair: Floats, unit: str) -> float | None:
    """The change that every cluster of the (k, 4) sums of two systems has; None where they differ, or it is no change of a share."""
    return agreed(pair[:, 2] / pair[:, 3] - pair[:, 0] / pair[:, 1], unit)


def _change(difference: float, draws: Floats, pair: Floats, quantity: Quantity) -> Change:
    """The change that (k, 4) sums of both systems show."""
    clusters = len(pair)
    if clusters < FEWEST_CLUSTERS:
        return Change(difference, None, None, None, verdict(None, 1.0, quantity.better, clusters))
    same = _agreed_change(pair, quantity.unit)
    ends = bounds(draws, clusters) if same is None else _around(same, clusters, _CHANGES)
    p = _swap_test(pair, quantity.transform)
    return Change(difference, *ends, p, verdict(ends, p, quantity.better, clusters))


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
    for part in parts(count_for(k), k):
        yield generator.integers(0, 2, (part.stop - part.start, k), dtype=np.int8)
