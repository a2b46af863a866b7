"""What a rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune.reporting.doctor.evidence import Evidence
from finetune.reporting.doctor.findings import Finding


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that may be wrong."""

    name: str
    looks_for: str
    """In a few words, for the documentation."""
    lacks: Callable[[Evidence], str | None]
    """Why the evidence is not enough to judge; None where it is."""
    find: Callable[[Evidence], Finding | None]
    """The finding; None where all is well. Asked only where nothing lacks."""
