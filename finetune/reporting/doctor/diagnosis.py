"""All rules in their order, and the file that keeps what they found."""

from __future__ import annotations

from finetune.errors import VerificationError
from finetune.reporting.doctor.adapter_rules import ADAPTER_RULES
from finetune.reporting.doctor.data_rules import DATA_RULES
from finetune.reporting.doctor.evaluated_rules import EVALUATED_RULES, drift_figures
from finetune.reporting.doctor.evidence import Evidence
from finetune.reporting.doctor.findings import Diagnosis
from finetune.reporting.doctor.generalization_rules import GENERALIZATION_RULES
from finetune.reporting.doctor.learning_rules import LEARNING_RULES
from finetune.reporting.doctor.machine_rules import MACHINE_RULES
from finetune.reporting.doctor.rule import Rule
from finetune.runs import RunDirectory
from finetune.sealed import read_json, write_json

FILE = "doctor.json"
"""In the run directory."""

RULES: tuple[Rule, ...] = (*LEARNING_RULES, *GENERALIZATION_RULES, *EVALUATED_RULES, *ADAPTER_RULES, *DATA_RULES, *MACHINE_RULES)
"""Every rule, in the order in which findings of one severity are shown."""


def diagnose(evidence: Evidence) -> Diagnosis:
    """What each rule finds in ``evidence``; a rule that lacks evidence says so and finds nothing."""
    not_run = {rule.name: why for rule in RULES if (why := rule.lacks(evidence))}
    ran = [rule for rule in RULES if rule.name not in not_run]
    found = [finding for rule in ran if (finding := rule.find(evidence))]
    return Diagnosis(
        run=evidence.run,
        state=evidence.state,
        steps=evidence.steps[-1].step if evidence.steps else 0,
        planned_steps=evidence.planned_steps,
        findings=tuple(sorted(found, key=lambda finding: finding.severity != "problem")),
        ran=tuple(rule.name for rule in ran),
        not_run=not_run,
        drift=None if isinstance(evidence.drift, str) else drift_figures(evidence.drift),
        notes=_notes(evidence),
    )


def _notes(evidence: Evidence) -> tuple[str, ...]:
    lost = evidence.unreadable
    if not lost:
        return ()
    which = f"line {lost[0]} is" if len(lost) == 1 else f"{len(lost)} lines, first {lost[0]}, are"
    return (f"metrics.jsonl is damaged: {which} no JSON, and the curve lacks them",)


def write_diagnosis(run: RunDirectory, diagnosis: Diagnosis) -> None:
    """Keep ``diagnosis`` in the run directory, where the report finds it."""
    write_json(run.path / FILE, diagnosis.as_dict())


def read_diagnosis(run: RunDirectory) -> Diagnosis | None:
    """What was last written; None where the run was not diagnosed. VerificationError where the file is damaged."""
    path = run.path / FILE
    if not path.is_file():
        return None
    values = read_json(path)
    try:
        return Diagnosis.from_dict(values)
    except (KeyError, TypeError) as error:
        raise VerificationError(f"the diagnosis is damaged: {error!r}", where=str(path), fix="run `finetune doctor` again") from error
