"""What the thesis and its methods claim, and what the runs say of each: no verdict is written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.evidence.records import Number, Run

MATCHED = 0.2
"""Two runs learned alike where the difference is at most this share of the larger: nearer ones are rare on grids of three rates."""

Arms = Mapping[str, tuple[Run, ...]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the runs say of a claim."""

    claim: str
    outcome: str
    """``held``, ``the opposite was seen``, ``no difference seen``, ``not measured``, or why no two runs can be compared."""
    from_: str
    """The numbers that it rests on."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs that learned alike."""

    one: Run
    other: Run
    forgotten: Number
    """By how much more the first forgot."""


def by_arm(runs: Sequence[Run]) -> Arms:
    """The runs of each arm, in the order of the sweep."""
    return {arm: tuple(run for run in runs if run.case.arm == arm) for arm in dict.fromkeys(run.case.arm for run in runs)}


def best(runs: Sequence[Run]) -> Run | None:
    """The run that learned most; None where none was measured."""
    return max((run for run in runs if "learned" in run.numbers), key=lambda run: run.numbers["learned"].value, default=None)


def at_an_end(run: Run, runs: Sequence[Run]) -> bool:
    """Whether the best rate is the lowest or the highest that was tried: a better one may lie beyond."""
    rates = [one.rate for one in runs]
    return run.rate in (min(rates), max(rates))


def matched(ones: Sequence[Run], others: Sequence[Run]) -> Pair | None:
    """Of the runs of two arms that learned anything, the two that learned most nearly alike; None where none did."""
    candidates = [(one, other) for one in _learners(ones) for other in _learners(others) if _distance(one, other) <= MATCHED]
    if not candidates:
        return None
    one, other = min(candidates, key=lambda pair: _distance(*pair))
    return Pair(one, other, one.numbers["forgotten"].less(other.numbers["forgotten"]))


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
    shuffled = [run for run in arms.get("shuffled", ()) if run.numbers]
    yield _shuffled("shuffled answers teach style: answers to facts never trained become likelier", shuffled, "style", _any_below)
    yield _shuffled("shuffled answers teach no substance, at any rate", shuffled, "learned", _none_above)


def _learns_more(claim: str, ones: Sequence[Run], others: Sequence[Run]) -> Verdict:
    one, other = best(ones), best(others)
    if one is None or other is None:
        return Verdict(claim, "not measured", "")
    difference = one.numbers["learned"].less(other.numbers["learned"])
    said = f"{told(one.numbers['learned'])} at {one.rate:g} against {told(other.numbers['learned'])} at {other.rate:g}"
    return Verdict(claim, _outcome(difference.sign), f"{said}: {told(difference)}")


def _forgets_less(claim: str, ones: Sequence[Run], others: Sequence[Run]) -> Verdict:
    if best(ones) is None or best(others) is None:
        return Verdict(claim, "not measured", "")
    pair = matched(ones, others)
    if pair is None:
        return Verdict(claim, "no two runs learned alike", f"within {MATCHED:.0%}, and more than nothing")
    return Verdict(claim, _outcome(-pair.forgotten.sign), f"at {pair.one.rate:g} and {pair.other.rate:g}: {told(pair.forgotten)}")


def _outcome(sign: int) -> str:
    return {1: "held", -1: "the opposite was seen", 0: "no difference seen"}[sign]


def _shuffled(claim: str, runs: Sequence[Run], column: str, holds: Callable[[Sequence[Number]], bool]) -> Verdict:
    numbers = {run.rate: run.numbers[column] for run in runs if column in run.numbers}
    if not numbers:
        return Verdict(claim, "not measured", "")
    said = ", ".join(f"{told(number)} at {rate:g}" for rate, number in numbers.items())
    return Verdict(claim, "held" if holds([*numbers.values()]) else "did not hold", said)


def _any_below(numbers: Sequence[Number]) -> bool:
    return any(number.sign < 0 for number in numbers)


def _none_above(numbers: Sequence[Number]) -> bool:
    return all(number.sign <= 0 for number in numbers)


def told(number: Number) -> str:
    """Such as ``+1.20 [+0.80, +1.60]``."""
    if not all(math.isfinite(part) for part in (number.value, number.low, number.high)):
        return f"{number.value:g}"
    return f"{number.value:+.2f} [{number.low:+.2f}, {number.high:+.2f}]"
