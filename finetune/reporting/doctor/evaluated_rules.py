"""Rules on what was measured of the finished model: what it forgot, and whether newer data is still what it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from finetune.reporting.doctor import changes
from finetune.reporting.doctor.evidence import Drift, Evidence, Loss
from finetune.reporting.doctor.findings import Finding
from finetune.reporting.doctor.rule import Rule

_FORGOTTEN = 0.25
"""Nats a token of general text: perplexity rose by 28 %. The quickstart, which learns 40 facts by heart, costs 0.14."""
_ANSWERS_LOST = 0.1
"""Share of general questions that are no longer answered."""
_SIGMAS = 2.0
_DRIFT = 0.05
"""Of the validation loss."""
_NORMAL_95 = 1.96


def figure_of(evidence: Evidence, name: str) -> Mapping[str, Any] | None:
    """A figure of the last evaluation that has both the base and the tuned model; None where it was not measured."""
    figures = () if isinstance(evidence.figures, str) else evidence.figures
    return next((figure for figure in figures if figure["name"] == name and {"base", "tuned"} <= set(figure["values"])), None)


def change_of(evidence: Evidence, name: str) -> float | None:
    """Tuned less base; None where it was not measured."""
    figure = figure_of(evidence, name)
    return None if figure is None else float(figure["values"]["tuned"] - figure["values"]["base"])


_GENERAL_TEXT, _GENERAL_QUESTIONS = "general text: loss", "general questions: four-way choice"


def _lacks_general(evidence: Evidence) -> str | None:
    if isinstance(evidence.figures, str):
        return evidence.figures
    if figure_of(evidence, _GENERAL_TEXT) is None and figure_of(evidence, _GENERAL_QUESTIONS) is None:
        return f"general text was not measured: finetune eval {evidence.run} -o 'evaluation.tasks=[{{task: forgetting}}]'"
    return None


def _forgetting(evidence: Evidence) -> Finding | None:
    lost: list[str] = []
    measured: dict[str, float | int | str] = {}
    text, questions = figure_of(evidence, _GENERAL_TEXT), change_of(evidence, _GENERAL_QUESTIONS)
    rise = change_of(evidence, _GENERAL_TEXT)
    if text is not None and rise is not None and rise > _FORGOTTEN and _is_sure(text):
        lost.append(f"the loss of general text rose by {rise:.2f} nats to {text['values']['tuned']:.2f}")
        measured["rise of the loss of general text"] = rise
    if questions is not None and (figure := figure_of(evidence, _GENERAL_QUESTIONS)) and -questions > max(_ANSWERS_LOST, _doubt(figure)):
        lost.append(f"general questions answered fell from {figure['values']['base']:.0%} to {figure['values']['tuned']:.0%}")
        measured["change of general questions"] = questions
    if not lost:
        return None
    reason = "the rate, or the number of passes over narrow data, moved the model further from its base than the task needs"
    overrides = changes.rate(evidence.config, 0.5)
    return Finding("forgetting", "problem", ", and ".join(lost), measured, reason, overrides)


def _is_sure(figure: Mapping[str, Any]) -> bool:
    """Whether the change is more than chance, where the evaluation says so."""
    change = (figure.get("changes") or {}).get("tuned")
    return change is None or not float(change["low"]) <= 0.0 <= float(change["high"])


def _doubt(figure: Mapping[str, Any]) -> float:
    """Two standard errors of a share."""
    share = float(figure["values"]["base"])
    return _SIGMAS * math.sqrt(max(share * (1 - share), 1 / figure["n"]) / figure["n"])


def _lacks_drift(evidence: Evidence) -> str | None:
    return evidence.drift if isinstance(evidence.drift, str) else None


def drift_figures(drift: Drift) -> dict[str, float | int | str]:
    """Losses and gains with 95 % intervals of the differences: newer rows less validation rows."""
    loss, gain = _difference(drift.newer, drift.validation), _difference(drift.newer_gain, drift.validation_gain)
    return {
        "newer data": drift.source,
        "newer rows": drift.newer_rows,
        "validation rows": drift.validation_rows,
        "loss on newer rows": drift.newer.mean,
        "loss on validation rows": drift.validation.mean,
        "difference of the losses": loss[0],
        "difference of the losses, low": loss[1],
        "difference of the losses, high": loss[2],
        "gain over the base on newer rows": drift.newer_gain.mean,
        "gain over the base on validation rows": drift.validation_gain.mean,
        "difference of the gains": gain[0],
        "difference of the gains, low": gain[1],
        "difference of the gains, high": gain[2],
    }


def _difference(newer: Loss, older: Loss) -> tuple[float, float, float]:
    change, half = newer.mean - older.mean, _NORMAL_95 * math.hypot(newer.error, older.error)
    return change, change - half, change + half


def _drift(evidence: Evidence) -> Finding | None:
    assert isinstance(evidence.drift, Drift)
    drift = evidence.drift
    loss, gain = _difference(drift.newer, drift.validation), _difference(drift.newer_gain, drift.validation_gain)
    # a loss that is higher for the base too means harder rows: what training gained must have shrunk as well
    if loss[1] <= 0 or loss[0] < _DRIFT * drift.validation.mean or gain[2] >= 0:
        return None
    what = (
        f"the loss is {drift.newer.mean:.3f} on newer rows and {drift.validation.mean:.3f} on validation rows: {loss[0]:+.3f} "
        f"(95 %: {loss[1]:+.3f} to {loss[2]:+.3f}); the gain over the base fell from {drift.validation_gain.mean:.3f} to "
        f"{drift.newer_gain.mean:.3f}"
    )
    reason = "the newer data is not what was trained on, and the base alone does not account for it: train on it too"
    return Finding("drift", "problem", what, drift_figures(drift), reason, changes.more_rows(evidence.config, drift.source))


EVALUATED_RULES = (
    Rule("forgetting", "general text and questions that became worse", _lacks_general, _forgetting),
    Rule("drift", "a loss that is higher on newer data (`--against`)", _lacks_drift, _drift),
)
