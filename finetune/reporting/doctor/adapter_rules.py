"""Rules on what training did to the weights: directions that are all in use, groups and modules that stood still."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean, median

from finetune.reporting.doctor import changes
from finetune.reporting.doctor.evidence import Evidence, Module
from finetune.reporting.doctor.findings import Finding
from finetune.reporting.doctor.generalization_rules import is_stuck
from finetune.reporting.doctor.learning_rules import lacks_curve
from finetune.reporting.doctor.rule import Rule

_FULL = 0.8
"""Effective rank over rank, at which hardly a direction is left unused."""
_STILL = 0.01
"""Of the largest rate, or of the largest change: less than a hundredth is none."""
_NO_DECAY, _OF_ADAMW, _OF_B = ", no decay", ", AdamW", " B"


def _lacks_modules(evidence: Evidence) -> str | None:
    return evidence.modules if isinstance(evidence.modules, str) else lacks_curve(evidence)


def _saturated(evidence: Evidence) -> Finding | None:
    modules = evidence.modules
    assert not isinstance(modules, str)
    used = mean(module.effective_rank / module.rank for module in modules) if modules else 0.0
    overrides = changes.capacity(evidence.config, 4)
    if used < _FULL or not overrides or not is_stuck(evidence):
        return None
    ranks = sorted({module.rank for module in modules})
    measured = {"effective rank over rank": used, "largest rank": ranks[-1], "modules": len(modules), "final loss": evidence.steps[-1].loss}
    what = f"the updates use {used:.0%} of their rank {ranks[-1]}, and the loss came to rest high"
    reason = "no direction is left for what is still to be learned"
    return Finding("saturated-adapter", "problem", what, measured, reason, overrides)


def _lacks_groups(evidence: Evidence) -> str | None:
    return None if evidence.groups else "plan.json names no groups"


def _dead_groups(evidence: Evidence) -> Finding | None:
    rates: dict[str, float] = defaultdict(float)
    for group in evidence.groups:
        entry = group.name.replace(_NO_DECAY, "").replace(_OF_ADAMW, "").removesuffix(_OF_B)
        rates[entry] = max(rates[entry], group.learning_rate)
    dead = {name: peak for name, peak in rates.items() if peak < _STILL * max(rates.values())}
    still = _still(evidence)
    if not dead and not still:
        return None
    measured: dict[str, float | int | str] = {f"learning rate of {name}": peak for name, peak in rates.items()}
    measured |= {f"size of the update, {role}": size for role, size in _sizes(evidence.modules).items()}
    if dead:
        what = f"the learning rate of {', '.join(dead)} is less than a hundredth of the largest"
        reason = "these parameters take memory and time, and stay about where they began"
        overrides = changes.joined(*(_revived(evidence, name) for name in dead))
    else:
        what = f"{len(still)} modules hardly changed, first {still[0]}"
        reason = "their updates are less than a hundredth of those of their kind: no gradient worth the name reaches them"
        overrides = ()
    return Finding("dead-groups", "problem", what, measured, reason, overrides)


def _revived(evidence: Evidence, name: str) -> changes.Overrides:
    group, path = evidence.config.optimizer.groups.get(name), changes.group_path(name)
    if group is None or path is None:
        return ()
    absolute = (f"{path}.learning_rate=null",) if group.learning_rate is not None else ()
    return (f"{path}.lr_ratio=1.0", *absolute)


def _sizes(modules: tuple[Module, ...] | str) -> dict[str, float]:
    """Median size of the updates of each role."""
    found: dict[str, list[float]] = defaultdict(list)
    for module in () if isinstance(modules, str) else modules:
        found[module.role].append(module.size)
    return {role: median(sizes) for role, sizes in found.items()}


def _still(evidence: Evidence) -> list[str]:
    """Modules that stood still beside others of their role; AdaLoRA prunes whole modules on purpose."""
    if isinstance(evidence.modules, str) or evidence.config.tuning.method == "adalora":
        return []
    sizes = _sizes(evidence.modules)
    return [module.name for module in evidence.modules if module.size < _STILL * sizes[module.role]]


ADAPTER_RULES = (
    Rule("saturated-adapter", "updates that use their whole rank, where the loss came to rest high", _lacks_modules, _saturated),
    Rule("dead-groups", "groups and modules that stood still", _lacks_groups, _dead_groups),
)
