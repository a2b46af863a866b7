"""What is wrong with a run, and what to change: rules over what the run left on disk.

    evidence.py     what the rules look at, read from the run directory
    curves.py       figures of a curve: levels, noise, spikes
    *_rules.py      the rules, each a function from evidence to a finding or None
    diagnosis.py    all rules in their order, and doctor.json

What needs the weights (the adapter's spectrum, losses on newer data) is measured by `finetune.diagnosing`, and handed in.
"""

from finetune.reporting.doctor.diagnosis import RULES, diagnose, read_diagnosis, write_diagnosis
from finetune.reporting.doctor.evidence import Drift, Evidence, Module, gather
from finetune.reporting.doctor.findings import Diagnosis, Finding

__all__ = [
    "RULES",
    "Diagnosis",
    "Drift",
    "Evidence",
    "Finding",
    "Module",
    "diagnose",
    "gather",
    "read_diagnosis",
    "write_diagnosis",
]
