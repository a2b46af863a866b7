"""What was learned, in four numbers: style, substance, extraction gap, efficiency, each with its interval.

Style is the change of facts never trained. Substance is what trained facts change beyond it (2309.14316 gives the idea of held-out
individuals). The extraction gap is what facts that were also asked about in training gain beyond those that were only read. Efficiency is
the substance for each 0.01 nat of general text forgotten. The arms hold different facts, so each is drawn apart from the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from finetune.config.figure_names import (
    ASKED,
    BINDING,
    CONTROL,
    EFFICIENCY,
    GAP,
    GENERAL_TEXT,
    HEADLINES,
    LOSS,
    READ,
    STYLE,
    SUBSTANCE,
    TRAINED,
)
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.results import Change, Headline
from finetune.evaluation.statistics import Sampled, sampled_change, verdict

__all__ = ["ASKED", "BINDING", "CONTROL", "GAP", "HEADLINES", "READ", "STYLE", "SUBSTANCE", "TRAINED", "contrasts", "headlines"]

_GROUPS = (TRAINED, ASKED, READ, CONTROL, "general text")


def headlines(measured: Mapping[str, Mapping[str, Measurement]], bases: Mapping[str, str]) -> tuple[Headline, ...]:
    """The four of every system in ``bases`` against the one it names; ``measured`` is by task, then by system.

    Empty where no knowledge was measured. What differs from its base for another reason than training has learned nothing: no plain
    models, and no other base.
    """
    systems = measured.get("knowledge", {})
    found: list[Headline] = []
    for system, base in bases.items():
        if system in systems:
            for measure_name in HEADLINES:
                found += _conclusions(system, measure_name, systems[base], systems[system])
            found += _efficiency(system, base, measured)
    return tuple(found)


def _conclusions(system: str, measure_name: str, before: Measurement, after: Measurement) -> Iterator[Headline]:
    aim = "lower" if measure_name == LOSS else "higher"
    for name, number in contrasts(measure_name, before, after).items():
        quantity = before.named(f"{CONTROL}: {measure_name}")
        better = "same" if name == STYLE else aim
        yield Headline(name, measure_name, quantity.unit if quantity else "", better, system, _stated(number, better))


def contrasts(measure_name: str, before: Measurement, after: Measurement) -> dict[str, Sampled]:
    """Style, substance and extraction gap, those of which were measured, between two systems.

    Every arm is drawn from a seed of its own, so that two runs which were asked about the same facts are drawn alike: the difference of
    their contrasts is a paired one.
    """
    trained, control, asked, read = (_arm_change(arm, measure_name, before, after) for arm in (TRAINED, CONTROL, ASKED, READ))
    if control is None:
        return {}
    found = {STYLE: control}
    if trained:
        found[SUBSTANCE] = trained - control
    if asked and read:
        found[GAP] = asked - read
    return found


def _arm_change(arm: str, measure_name: str, before: Measurement, after: Measurement) -> Sampled | None:
    one, other = before.named(f"{arm}: {measure_name}"), after.named(f"{arm}: {measure_name}")
    return sampled_change(one, other, _GROUPS.index(arm)) if one and other else None


def _efficiency(system: str, base: str, measured: Mapping[str, Mapping[str, Measurement]]) -> Iterator[Headline]:
    """Nothing where no general text was measured, or where it cannot be told that any was forgotten: a ratio to zero says nothing."""
    general = measured.get("forgetting", {})
    if system not in general:
        return
    before, after = (general[name].named(GENERAL_TEXT) for name in (base, system))
    trained, control = (_arm_change(arm, LOSS, *(measured["knowledge"][name] for name in (base, system))) for arm in (TRAINED, CONTROL))
    if not (before and after and trained and control):
        return
    forgotten = sampled_change(before, after, _GROUPS.index("general text"))
    if forgotten.interval and forgotten.interval[0] > 0:
        number = (control - trained).over(forgotten).times(0.01)
        yield Headline(EFFICIENCY, LOSS, "nats/token for 0.01 forgotten", "higher", system, _stated(number, "higher"))


def _stated(number: Sampled, better: str) -> Change:
    low, high = number.interval or (None, None)
    p = number.p if number.interval else None
    return Change(number.value, low, high, p, verdict(number.interval, 1.0 if p is None else p, better, number.clusters))
