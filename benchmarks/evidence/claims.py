"""What the thesis and its methods claim, and what the runs say of each: no verdict is written by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.evidence.records import Number, Run
from finetune.evaluation.statistics import Sampled

MATCHED = 0.2
"""Two runs learned alike where the difference is at most this share of the larger: nearer ones are rare on grids of three rates."""

_CONTROL = ("control", "control, by choice")

Arms = Mapping[str, tuple[Run, ...]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the runs say of a claim."""

    claim: str
    outcome: str
    """``held``, ``the opposite was seen``, ``no difference seen``, ``none seen``, ``not measured``, or why nothing can be compared."""
    from_: str
    """The numbers that it rests on."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs that learned alike."""

    one: Run
    other: Run
    learned: Number
    """By how much more the first learned."""
    forgotten: Number
    """By how much more the first forgot."""


def by_arm(runs: Sequence[Run]) -> Arms:
    """The runs of each arm, in the order of the sweep."""
    return {arm: tuple(run for run in runs if run.case.arm == arm) for arm in dict.fromkeys(run.case.arm for run in runs)}


def best(runs: Sequence[Run]) -> Run | None:
    """The run that learned most; None where none was measured."""
    return max((run for run in runs if "learned" in run.numbers), key=lambda run: run.numbers["learned"].value, default=None)


def most_learned(runs: Sequence[Run]) -> Number:
    """What the best of ``runs`` learned, chosen anew in every resample: that the best was looked for widens the interval."""
    found = [run.numbers["learned"] for run in runs if "learned" in run.numbers]
    top = max(found, key=lambda number: number.value)
    sampled = [number.sampled for number in found if number.sampled is not None]
    if len(sampled) < len(found):
        return top
    unseen = (max(one.below for one in sampled), max(one.above for one in sampled))
    chosen = Sampled(top.value, np.max([one.draws for one in sampled], axis=0), sampled[0].clusters, *unseen)
    return top if chosen.interval is None else Number(top.value, *chosen.interval, chosen)


def at_an_end(run: Run, runs: Sequence[Run]) -> bool:
    """Whether the best rate is the lowest or the highest that was tried: a better one may lie beyond."""
    rates = [one.rate for one in runs]
    return run.rate in (min(rates), max(rates))


def matched(ones: Sequence[Run], others: Sequence[Run]) -> Pair | None:
    """Of the runs of two arms that learned anything, the two that learned most nearly alike; None where none did.

    Alike: within `MATCHED` of each other, and no difference to be seen.
    """
    candidates = [(one, other) for one in _learners(ones) for other in _learners(others) if _distance(one, other) <= MATCHED]
    candidates = [(one, other) for one, other in candidates if not one.numbers["learned"].less(other.numbers["learned"]).sign]
    if not candidates:
        return None
    one, other = min(candidates, key=lambda pair: _distance(*pair))
    learned, forgotten = (one.numbers[column].less(other.numbers[column]) for column in ("learned", "forgotten"))
    return Pair(one, other, learned, forgotten)


def _learners(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if "forgotten" in run.numbers and "learned" in run.numbers and run.numbers["learned"].sign > 0]


def _distance(one: Run, other: Run) -> float:
    left, right = (run.numbers["learned"].value for run in (one, other))
    return abs(left - right) / max(left, right)


# --- claims --------------------------------------------------------------------------------------------------------------------------


def verdicts(arms: Arms) -> Iterator[Verdict]:
    """Every claim with what the runs say of it."""
    for claim, one, other in (
        ("LoRA on all linear layers learns more than on attention alone", "lora", "lora-attention"),
        ("rsLoRA at a high rank learns more than LoRA at rank 16", "rslora", "lora"),
        ("LoftQ learns more than NF4 without it", "loftq", "nf4"),
        ("a 4-bit base learns less than an unquantized one", "lora", "nf4"),
        ("differential rates learn more than one rate", "differential", "lora"),
        ("the trifecta learns more than LoRA on attention alone", "trifecta", "lora-attention"),
        ("the trifecta learns more than LoRA on all linear layers", "trifecta", "lora"),
        ("the trifecta learns more than rsLoRA alone", "trifecta", "rslora"),
        ("LoRA+ learns more than LoRA", "lora-plus", "lora"),
        ("DoRA learns more than LoRA", "dora", "lora"),
        ("full tuning learns more than LoRA", "full", "lora"),
    ):
        yield _learns_more(claim, arms.get(one, ()), arms.get(other, ()))
    for claim, one, other in (
        ("LoRA forgets less than full tuning that learned as much", "lora", "full"),
        ("differential rates forget less than one rate that learned as much", "differential", "lora"),
        ("the trifecta forgets less than full tuning that learned as much", "trifecta", "full"),
    ):
        yield _forgets_less(claim, arms.get(one, ()), arms.get(other, ()))
    shuffled = arms.get("shuffled", ())
    yield _taught_style("shuffled answers teach style: answers to facts never trained become likelier", shuffled)
    yield _taught_nothing("shuffled answers teach no substance, at any rate", shuffled)
    yield _taught_by_pairs(
        "right answers teach more than shuffled ones, at every rate at which right ones teach", arms.get("lora", ()), shuffled
    )
    yield _at_chance("facts never trained stay at chance", [run for runs in arms.values() for run in runs])


def _learns_more(claim: str, ones: Sequence[Run], others: Sequence[Run]) -> Verdict:
    one, other = best(ones), best(others)
    if one is None or other is None:
        return Verdict(claim, "not measured", "")
    first, second = most_learned(ones), most_learned(others)
    difference = first.less(second)
    said = f"{told(first)} at {_rate(one, ones)} against {told(second)} at {_rate(other, others)}"
    return Verdict(claim, _outcome(difference.sign), f"{said}: {told(difference)}")


def _rate(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.rate:g}{' (an end of its grid)' if at_an_end(run, runs) else ''}"


def _forgets_less(claim: str, ones: Sequence[Run], others: Sequence[Run]) -> Verdict:
    if best(ones) is None or best(others) is None:
        return Verdict(claim, "not measured", "")
    pair = matched(ones, others)
    if pair is None:
        return Verdict(claim, "no two runs learned alike", f"within {MATCHED:.0%}, and more than nothing")
    alike = f"learned {told(pair.learned)}"
    return Verdict(claim, _outcome(-pair.forgotten.sign), f"at {pair.one.rate:g} and {pair.other.rate:g}, {alike}: {told(pair.forgotten)}")


def _outcome(sign: int) -> str:
    return {1: "held", -1: "the opposite was seen", 0: "no difference seen"}[sign]


def _columns(runs: Sequence[Run], *columns: str) -> list[Run] | None:
    """``runs``; None where one of them lacks a number: "at any rate" is only said of all rates."""
    return [*runs] if runs and all(column in run.numbers for run in runs for column in columns) else None


def _each(runs: Sequence[Run], numbers: Sequence[Number]) -> str:
    return ", ".join(f"{told(number)} at {run.rate:g}" for run, number in zip(runs, numbers, strict=True))


def _taught_style(claim: str, runs: Sequence[Run]) -> Verdict:
    found = _columns(runs, "style")
    if found is None:
        return Verdict(claim, "not measured", "")
    numbers = [run.numbers["style"] for run in found]
    outcome = "held" if any(number.sign < 0 for number in numbers) else "no difference seen"
    return Verdict(claim, outcome, _each(found, numbers))


def _taught_nothing(claim: str, runs: Sequence[Run]) -> Verdict:
    """That none was seen is not that there is none: "held" is never said."""
    found = _columns(runs, "learned")
    if found is None:
        return Verdict(claim, "not measured", "")
    numbers = [run.numbers["learned"] for run in found]
    return Verdict(claim, "the opposite was seen" if any(number.sign > 0 for number in numbers) else "none seen", _each(found, numbers))


def _taught_by_pairs(claim: str, right: Sequence[Run], shuffled: Sequence[Run]) -> Verdict:
    """The two arms have the same rates: at each at which right answers taught, the difference is the worth of the right pairs."""
    ones, others = _columns(right, "learned"), _columns(shuffled, "learned")
    if ones is None or others is None:
        return Verdict(claim, "not measured", "")
    by_rate = {run.rate: run for run in others}
    taught = [run for run in ones if run.numbers["learned"].sign > 0 and run.rate in by_rate]
    if not taught:
        return Verdict(claim, "right answers taught nothing that was seen", _each(ones, [run.numbers["learned"] for run in ones]))
    numbers = [run.numbers["learned"].less(by_rate[run.rate].numbers["learned"]) for run in taught]
    return Verdict(claim, _outcome(min(number.sign for number in numbers)), _each(taught, numbers))


def _at_chance(claim: str, runs: Sequence[Run]) -> Verdict:
    """No run's control rises, by binding or by choice, beyond what the most extreme of so many tests may show by chance (Bonferroni)."""
    numbers = [(run, column, run.numbers[column]) for run in runs for column in _CONTROL if column in run.numbers]
    if not numbers:
        return Verdict(claim, "not measured", "")
    level = 0.05 / len(numbers)
    rose = [one for one in numbers if one[2].value > 0 and one[2].p is not None and one[2].p < level]
    run, column, number = max(numbers, key=lambda one: one[2].value / (one[2].error or math.inf))
    most = f"the clearest rise of {len(numbers)}: {column} {told(number)} in {run.case.run.name}"
    return Verdict(claim, "did not hold" if rose else "held", most)


def told(number: Number) -> str:
    """Such as ``+1.20 [+0.80, +1.60]``."""
    if not all(math.isfinite(part) for part in (number.value, number.low, number.high)):
        return f"{number.value:g}"
    return f"{number.value:+.2f} [{number.low:+.2f}, {number.high:+.2f}]"
