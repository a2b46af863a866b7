"""Rules on what was learned beyond the training rows: validation, layers, regularization."""

from __future__ import annotations

import math

from finetune.config.methods import targets_of
from finetune.reporting.doctor import changes
from finetune.reporting.doctor.curves import LEAST_STEPS, NOTICEABLE, course
from finetune.reporting.doctor.evaluated_rules import change_of
from finetune.reporting.doctor.evidence import Evaluation, Evidence
from finetune.reporting.doctor.findings import Finding
from finetune.reporting.doctor.learning_rules import is_flat, is_unstable, lacks_curve, per_epoch, validation_rose
from finetune.reporting.doctor.rule import Rule

_GAP = 3.0
"""Validation over training loss: the rows are known by heart. The quickstart, few facts in many wordings, has 1.3."""
_FELL = 0.2
"""Share by which the training loss must have fallen, for the other half of a comparison to mean something."""
_FOLLOWED = 0.5
"""Of what training gained on its rows, the least that rows of the same kind should gain."""
_REPEATED = 5
"""Epochs after which an adapter that could hold the rows would have learned them."""
_STUCK = 0.4
"""Share of the initial loss that is left on rows seen so often."""
_AT_REST = 0.2
"""Share of the fall in the later half of the learning rate spent, below which the loss had come to rest (see `Course.late_share`)."""
_FEW_ROWS = 1000
"""Below it recipes for small data use dropout of 0.10 to 0.15 and decay of 0.05 to 0.1."""
_OFTEN = 10
"""Epochs, the upper bound of the recipe for small data."""
_LITTLE_DROPOUT = 0.05
_SMALL_GAP = 1.3
"""Validation over training loss that needs no regularization, however few the rows are."""

_ATTENTION_NAMES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj"})


# --- validation ----------------------------------------------------------------------------------------------------------------------


def _lacks_validation(evidence: Evidence) -> str | None:
    if evidence.config.data.validation is None:
        return "there is no validation data: data.validation={fraction: 0.02}"
    if not evidence.evaluations:
        return "the run was not validated yet"
    return lacks_curve(evidence)


def _best(evidence: Evidence) -> Evaluation:
    return min(evidence.evaluations, key=lambda one: one.loss)


def _overfitting(evidence: Evidence) -> Finding | None:
    if is_unstable(evidence):
        return None
    best, last, found = _best(evidence), evidence.evaluations[-1], course(evidence.steps)
    fell = found.relative_fall > _FELL
    by_heart = fell and last.loss > max(_GAP * found.final, found.final + NOTICEABLE)
    if not by_heart and not (validation_rose(evidence) and found.fall > 0):
        return None
    measured = {
        "lowest validation loss": best.loss,
        "at step": best.step,
        "last validation loss": last.loss,
        "final training loss": found.final,
    }
    measured |= {"training rows": evidence.data.train.examples, "epochs": evidence.config.train.epochs}
    if validation_rose(evidence):
        what = (
            f"validation loss rose from {best.loss:.3f} (step {best.step}) to {last.loss:.3f} while training loss fell to {found.final:.3f}"
        )
    else:
        what = f"validation loss is {last.loss:.3f}, {last.loss / found.final:.1f} times the training loss of {found.final:.3f}"
    reason = "the model learns its rows by heart; other rows, in many wordings, help more than any of these changes"
    return Finding("overfitting", "problem", what, measured, reason, _against_overfitting(evidence, best))


def _against_overfitting(evidence: Evidence, best: Evaluation) -> changes.Overrides:
    config, passed = evidence.config, best.step
    if config.train.max_steps is None:  # a run is counted in whole passes
        passed = math.ceil(best.step / per_epoch(evidence)) * per_epoch(evidence)
    shorter = changes.length(config, passed, per_epoch(evidence)) if 0 < passed < evidence.planned_steps else ()
    stop = ("train.early_stopping={patience: 2}",) if config.train.early_stopping is None else ()
    return changes.joined(shorter, changes.regularization(config), stop)


# --- layers --------------------------------------------------------------------------------------------------------------------------


def _lacks_layers(evidence: Evidence) -> str | None:
    if not _without_mlp(evidence):
        return None  # it runs, and finds nothing
    return lacks_curve(evidence)


def _without_mlp(evidence: Evidence) -> bool:
    """Whether adapters go to attention alone."""
    targets = targets_of(evidence.config.tuning)
    if isinstance(targets, tuple):
        return {name.rpartition(".")[2] for name in targets} <= _ATTENTION_NAMES
    if targets == "attention":
        return True
    modules = evidence.modules
    return targets is not None and not isinstance(modules, str) and bool(modules) and {one.role for one in modules} == {"attention"}


def is_stuck(evidence: Evidence) -> bool:
    """Whether the loss came to rest high, on rows that were seen often: the adapter cannot hold them."""
    if len(evidence.steps) < LEAST_STEPS or is_unstable(evidence) or is_flat(evidence):
        return False
    found = course(evidence.steps)
    seen = evidence.steps[-1].step * evidence.config.train.batch_size / max(1, evidence.data.train.examples)
    return seen >= _REPEATED and found.final >= _STUCK * found.initial and found.late_share <= _AT_REST


def _wrong_layers(evidence: Evidence) -> Finding | None:
    if not _without_mlp(evidence) or is_unstable(evidence) or is_flat(evidence):
        return None
    found = course(evidence.steps)
    measured: dict[str, float | int | str] = {"initial loss": found.initial, "final training loss": found.final}
    what = ""
    if evidence.evaluations and found.relative_fall > _FELL and not validation_rose(evidence):
        gained = found.initial - _best(evidence).loss
        if gained < _FOLLOWED * found.fall:
            what = f"training gained {found.fall:.2f} nats and validation {gained:.2f}"
            measured |= {"lowest validation loss": _best(evidence).loss}
    if is_stuck(evidence):
        what = f"the loss came to rest at {found.final:.2f}, {found.final / found.initial:.0%} of where it began, on rows seen many times"
    if knowledge := _style_alone(evidence):
        what = f"trained facts gained {knowledge[0]:.2f} nats, facts never trained {knowledge[1]:.2f}: style, hardly knowledge"
        measured |= {"gain of trained facts": knowledge[0], "gain of facts never trained": knowledge[1]}
    if not what:
        return None
    reason = "adapters go to attention alone, which decides where to look; facts sit mostly in the MLP"
    return Finding("wrong-layers", "problem", f"{what}, and only attention trains", measured, reason, ("tuning.targets=all-linear",))


def _style_alone(evidence: Evidence) -> tuple[float, float] | None:
    """Gains of trained and of untrained facts, where most of the former is had by the latter too."""
    trained, control = (change_of(evidence, name) for name in ("all trained facts: answer loss", "never trained (control): answer loss"))
    if trained is None or control is None or trained >= 0:
        return None
    return (-trained, -control) if control < 0 and control < _FOLLOWED * trained else None


# --- regularization ------------------------------------------------------------------------------------------------------------------


def _weak_regularization(evidence: Evidence) -> Finding | None:
    config, rows = evidence.config, evidence.data.train.examples
    dropout = getattr(config.tuning, "dropout", None)
    passes = evidence.steps[-1].step * config.train.batch_size / max(1, rows)
    if dropout is None or dropout >= _LITTLE_DROPOUT or rows >= _FEW_ROWS or passes < _OFTEN:
        return None
    if is_unstable(evidence) or is_flat(evidence) or is_stuck(evidence):
        return None
    found = course(evidence.steps)
    if evidence.evaluations and evidence.evaluations[-1].loss < max(_SMALL_GAP * found.final, found.final + NOTICEABLE):
        return None
    measured = {"training rows": rows, "times each was seen": passes, "dropout": dropout, "weight decay": config.optimizer.weight_decay}
    what = f"{rows} rows were seen {passes:.0f} times each with a dropout of {dropout:g}"
    reason = "so few rows are learned by heart unless noise keeps the adapter from it"
    return Finding("weak-regularization", "advice", what, measured, reason, changes.regularization(config))


GENERALIZATION_RULES = (
    Rule("overfitting", "validation loss that rises, or is a multiple of the training loss", _lacks_validation, _overfitting),
    Rule("wrong-layers", "adapters on attention alone, where knowledge was not learned", _lacks_layers, _wrong_layers),
    Rule("weak-regularization", "few rows, seen often, with hardly any dropout", lacks_curve, _weak_regularization),
)
