"""What a diagnosis is: findings with their evidence, and an account of the rules that ran and of those that could not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

Severity = Literal["problem", "advice"]
"""`problem`: the result is worse for it. `advice`: time or memory is lost, or the result may be worse for it."""
State = Literal["finished", "unfinished", "failed"]
Number = float | int


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with a run, why, and what to change."""

    rule: str
    severity: Severity
    what: str
    """One sentence: what was seen."""
    evidence: Mapping[str, Number | str]
    """What was measured, by name, with the unit in the name; numbers but for names of groups and modules."""
    reason: str
    """Why that is so, as far as the evidence goes, and what to do where no key of the configuration does it."""
    overrides: tuple[str, ...] = ()
    """Ready for `-o`, all together: the run's own configuration with them is valid."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `finetune doctor RUN` found."""

    run: str
    state: State
    steps: int
    """Optimizer steps that were done."""
    planned_steps: int
    findings: tuple[Finding, ...]
    """Problems first; none where all is well."""
    ran: tuple[str, ...]
    """Rules that had what they need."""
    not_run: Mapping[str, str]
    """The other rules, and what each lacked."""
    drift: Mapping[str, Number | str] | None = None
    """With `--against`: losses on newer data and on validation rows, whether or not they made a finding."""
    notes: tuple[str, ...] = ()
    """What a reader must know of the evidence, such as damage that the rules passed over."""
    format: int = field(default=1)
    """Of doctor.json."""

    def as_dict(self) -> dict[str, Any]:
        """For doctor.json and `--json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The diagnosis of `as_dict`, also after JSON made lists of tuples. KeyError or TypeError where it is none."""
        findings = tuple(Finding(**finding | {"overrides": tuple(finding["overrides"])}) for finding in values["findings"])
        return cls(**{**values, "findings": findings, "ran": tuple(values["ran"]), "notes": tuple(values.get("notes", ()))})
