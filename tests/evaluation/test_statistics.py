"""Intervals cover the truth as often as they claim, clusters and pairs count as such, and words follow the numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from finetune.evaluation.resampling import FEWEST_CLUSTERS, student
from finetune.evaluation.statistics import (
    Quantity,
    Sampled,
    compare,
    mean,
    ratio,
    sampled_change,
    verdict,
)

Draw = Callable[[np.random.Generator], Quantity]


def _share(right: object) -> Quantity:
    return mean("x: right", "share", "higher", right, range(len(right)))  # type: ignore[arg-type]


# --- values --------------------------------------------------------------------------------------------------------------------------


def test_a_quantity_is_a_ratio_of_sums_and_its_exponential() -> None:
    nats, tokens = [3.0, 5.0, 4.0], [1, 2, 3]
    assert ratio("l", "nats/token", "lower", (nats, tokens), range(3)).value == pytest.approx(2.0)
    assert ratio("p", "", "lower", (nats, tokens), range(3), "exp").value == pytest.approx(math.exp(2.0))


@pytest.mark.parametrize(
    ("numerators", "denominators", "clusters"),
    [([1.0], [1.0, 1.0], [0]), ([], [], []), ([1.0, 1.0], [0.0, 1.0], [0, 1]), ([math.nan], [1.0], [0])],
)
def test_parts_that_do_not_belong_together_are_refused(numerators: list[float], denominators: list[float], clusters: list[int]) -> None:
    with pytest.raises(ValueError, match="x: "):
        ratio("x", "", "lower", (numerators, denominators), clusters)


def test_systems_on_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="different items"):
        compare({"base": _share([1, 0]), "tuned": _share([1, 0, 1])})


# --- intervals -----------------------------------------------------------------------------------------------------------------------


def test_students_points_are_those_of_the_tables() -> None:
    for freedom, point in {5: 2.5706, 10: 2.2281, 23: 2.0687, 149: 1.9760}.items():
        assert student(freedom) == pytest.approx(point, abs=5e-4)


def test_the_interval_of_many_items_is_that_of_the_normal_distribution() -> None:
    """Closed form: a mean has the standard error s / sqrt(n), a ratio that of its linearization."""
    generator = np.random.default_rng(3)
    tokens = generator.integers(3, 12, 2000)
    nats = tokens * generator.gamma(4, 0.5, 2000)
    found = ratio("x", "nats/token", "lower", (nats, tokens), range(2000))
    low, high = compare({"base": found}).intervals["base"]
    residuals = nats - found.value * tokens
    error = residuals.std(ddof=1) / math.sqrt(2000) / tokens.mean()
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert (high + low) / 2 == pytest.approx(found.value, abs=0.15 * error)


def _few_right(generator: np.random.Generator) -> Quantity:
    return _share(generator.random(24) < 0.05)


def _wordings(generator: np.random.Generator) -> Quantity:
    """24 facts in three wordings: some facts are known, others are not."""
    right = generator.binomial(1, np.repeat(generator.beta(0.3, 0.7, 24), 3))
    return mean("x", "share", "higher", right, np.repeat(np.arange(24), 3))


def _nats(generator: np.random.Generator) -> Quantity:
    tokens = generator.integers(3, 12, 24)
    return ratio("x", "nats/token", "lower", (tokens * generator.gamma(4, 0.5, 24), tokens), range(24))


@pytest.mark.parametrize(("draw", "truth"), [(_few_right, 0.05), (_wordings, 0.3), (_nats, 2.0)])
def test_95_percent_intervals_cover_the_truth_that_often(draw: Draw, truth: float) -> None:
    """A simulation: 160 experiments with known truth. The plain percentile interval covers 0.72 of the first kind."""
    generator = np.random.default_rng(11)
    covered = 0
    for _ in range(160):
        low, high = compare({"base": draw(generator)}).intervals["base"]
        covered += low <= truth <= high
    assert covered / 160 >= 0.91


def test_wordings_of_one_fact_are_no_further_facts() -> None:
    right = np.random.default_rng(1).random(30) < 0.4
    alone = compare({"base": _share(right)}).intervals["base"]
    clusters = np.repeat(np.arange(30), 3)
    thrice = compare({"base": mean("x", "share", "higher", np.repeat(right, 3), clusters)}).intervals["base"]
    assert thrice == pytest.approx(alone)


def test_none_of_24_right_may_still_be_some() -> None:
    """Clopper-Pearson's bound for 0 of 24 is 1 - 0.025 ** (1 / 24)."""
    found = compare({"base": _share(np.zeros(24)), "same": _share(np.zeros(24)), "all": _share(np.ones(24))})
    assert found.intervals["base"] == pytest.approx((0.0, 0.1425), abs=1e-4)
    assert found.intervals["all"] == pytest.approx((1 - 0.1425, 1.0), abs=1e-4)
    assert found.changes["same"].high == pytest.approx(0.1425, abs=1e-4)
    assert found.changes["same"].verdict == "no difference seen with n=24"
    assert found.changes["all"].low == pytest.approx(1 - 2 * 0.1425, abs=1e-3)


def test_too_few_items_get_no_interval_and_no_verdict() -> None:
    few = FEWEST_CLUSTERS - 1
    found = compare({"base": _share(np.zeros(few)), "tuned": _share(np.ones(few))})
    assert found.intervals == {}
    assert found.changes["tuned"].low is None
    assert found.changes["tuned"].p is None
    assert found.changes["tuned"].verdict == f"no difference seen with n={few}"


def test_the_same_items_give_the_same_intervals_in_any_order() -> None:
    right = np.random.default_rng(2).random(40) < 0.4
    order = np.random.default_rng(5).permutation(40)
    assert compare({"base": _share(right)}) == compare({"base": mean("x", "share", "higher", right[order], order)})


# --- pairs ---------------------------------------------------------------------------------------------------------------------------


def test_pairs_see_what_two_intervals_do_not() -> None:
    generator = np.random.default_rng(4)
    before = generator.gamma(4, 0.5, 60)
    after = before - 0.1 + 0.05 * generator.standard_normal(60)
    found = compare({name: mean("x", "nats/token", "lower", values, range(60)) for name, values in {"a": before, "b": after}.items()})
    assert found.intervals["a"][0] < found.values["b"] < found.intervals["a"][1]
    assert found.changes["b"].verdict == "better"
    assert found.changes["b"].high is not None
    assert found.changes["b"].high < 0


def test_p_is_the_share_of_all_swaps_that_give_as_large_a_difference() -> None:
    """Every swap of nine pairs, written out."""
    generator = np.random.default_rng(6)
    a, b = generator.gamma(2, 1, 9), generator.gamma(2, 1, 9) + 0.8
    seen = abs(b.mean() - a.mean())
    differences = [abs(np.mean(np.where(signs, a - b, b - a))) for signs in itertools.product((False, True), repeat=9)]
    expected = sum(one >= seen - 1e-12 for one in differences) / 2**9
    found = compare({"a": mean("x", "nats", "lower", a, range(9)), "b": mean("x", "nats", "lower", b, range(9))})
    assert found.changes["b"].p == pytest.approx(expected)


def test_p_of_equal_systems_is_rarely_small() -> None:
    generator = np.random.default_rng(7)
    small = 0
    for _ in range(100):
        both = generator.random((2, 30)) < 0.4
        change = compare({"a": _share(both[0]), "b": _share(both[1])}).changes["b"]
        small += change.verdict != "no difference seen with n=30"
    assert small <= 9


@pytest.mark.parametrize(
    ("change", "p", "better", "said"),
    [
        ((0.1, 0.3), 0.01, "higher", "better"),
        ((0.1, 0.3), 0.01, "lower", "worse"),
        ((-0.3, -0.1), 0.01, "lower", "better"),
        ((-0.3, -0.1), 0.01, "same", "lower"),
        ((0.1, 0.3), 0.01, "same", "higher"),
        ((-0.1, 0.3), 0.01, "higher", "no difference seen with n=24"),
        ((0.1, 0.3), 0.06, "higher", "no difference seen with n=24"),
        (None, 0.01, "higher", "no difference seen with n=24"),
    ],
)
def test_words_need_the_interval_and_p(change: tuple[float, float] | None, p: float, better: str, said: str) -> None:
    assert verdict(change, p, better, 24) == said


# --- contrasts -----------------------------------------------------------------------------------------------------------------------


def test_a_contrast_of_two_groups_has_the_error_of_both() -> None:
    """Closed form: variances of independent groups add."""
    generator = np.random.default_rng(8)
    changes = [generator.normal(centre, 1.0, 400) for centre in (-2.0, -0.5)]
    numbers = [
        sampled_change(mean("x", "nats", "lower", np.zeros(400), range(400)), mean("x", "nats", "lower", change, range(400)), group)
        for group, change in enumerate(changes)
    ]
    contrast = numbers[0] - numbers[1]
    assert contrast.value == pytest.approx(changes[0].mean() - changes[1].mean())
    assert contrast.interval is not None
    low, high = contrast.interval
    error = math.sqrt(sum(change.var(ddof=1) / 400 for change in changes))
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert contrast.p < 0.01
    assert contrast.times(2.0).value == pytest.approx(2 * contrast.value)
    assert numbers[0].over(numbers[1]).value == pytest.approx(numbers[0].value / numbers[1].value)


def _moved(rises: Sequence[float], group: int) -> Sampled:
    """The change of a share that was 0 for every fact: ``rises`` by fact."""
    before, after = (mean("x: right", "share", "higher", values, range(len(rises))) for values in (np.zeros(len(rises)), rises))
    return sampled_change(before, after, group)


def _unseen(clusters: int) -> float:
    """The share that may be otherwise though none of ``clusters`` is: Clopper and Pearson's bound is the root of (1 - x)^n = 0.025."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - middle) ** clusters > 0.025 else (low, middle)
    return low


def test_facts_that_all_agree_are_not_known_exactly_in_a_contrast() -> None:
    """28 of 28 trained facts went from wrong to right, none of 20 others: by resamples alone 1.0 to 1.0."""
    trained, control = _moved([1.0] * 28, 0), _moved([0.0] * 20, 1)
    assert trained.interval == pytest.approx((1 - 2 * _unseen(28), 1.0))  # a fact that fell instead would differ by 2
    assert control.interval == pytest.approx((-_unseen(20), _unseen(20)))
    single = compare({"a": _share(np.zeros(20)), "b": _share(np.zeros(20))}).changes["b"]
    assert control.interval == pytest.approx((single.low, single.high))
    found = trained - control
    assert found.value == 1.0
    assert found.interval == pytest.approx((1 - math.hypot(2 * _unseen(28), _unseen(20)), 1 + _unseen(20)))
    assert found.times(-0.5).interval == pytest.approx((-0.5 - _unseen(20) / 2, -0.5 + math.hypot(2 * _unseen(28), _unseen(20)) / 2))
    half = found.over(_sure_change(2.0))
    assert half.interval == pytest.approx((0.5 - math.hypot(2 * _unseen(28), _unseen(20)) / 2, 0.5 + _unseen(20) / 2))


def _sure_change(value: float) -> Sampled:
    """A change that every resample shows alike, and that is no share."""
    return sampled_change(mean("x", "nats", "lower", [0.0] * 30, range(30)), mean("x", "nats", "lower", [value] * 30, range(30)), 2)


def test_a_control_that_agrees_widens_the_contrast_by_what_it_leaves_open() -> None:
    rises = np.random.default_rng(3).random(40) < 0.6
    trained = _moved(rises.astype(float).tolist(), 0)
    assert trained.interval is not None
    low, high = (trained - _moved([0.0] * 40, 1)).interval or (0.0, 0.0)
    assert trained.value - low == pytest.approx(math.hypot(trained.value - trained.interval[0], _unseen(40)))
    assert high - trained.value == pytest.approx(math.hypot(trained.interval[1] - trained.value, _unseen(40)))


@pytest.mark.parametrize("facts", range(6, 12))
def test_p_is_below_a_twentieth_only_where_the_interval_excludes_zero(facts: int) -> None:
    """At six facts of each kind, resamples alone would say p = 0.0005."""
    found = _moved([1.0] * facts, 0) - _moved([0.0] * facts, 1)
    assert found.interval is not None
    assert (found.p < 0.05) == (found.interval[0] > 0.0)
    assert _moved([0.0] * facts, 1).p == 1.0


def test_contrasts_of_shares_near_an_end_cover_the_truth() -> None:
    """A simulation: 200 experiments, in 74 % of which an arm agrees. By resamples alone 0.80 of the intervals cover it."""
    generator = np.random.default_rng(17)
    covered = 0
    for _ in range(200):
        arms = [(generator.random(count) < share).astype(float).tolist() for count, share in ((28, 0.97), (20, 0.03))]
        low, high = (_moved(arms[0], 0) - _moved(arms[1], 1)).interval or (2.0, 2.0)
        covered += low <= 0.94 <= high
    assert covered / 200 >= 0.95


def test_memory_of_many_items_is_bounded() -> None:
    """50,000 items: resamples are drawn in slices, and fewer of them."""
    right = np.random.default_rng(9).random(50_000) < 0.3
    low, high = compare({"base": _share(right)}).intervals["base"]
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.21 / 50_000), rel=0.12)
