"""`finetune doctor RUN`: the evidence of a run, from its files, its adapter and newer data, judged by the doctor's rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.analysis.checks import no_factors
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.errors import VerificationError
from finetune.process import loading
from finetune.reporting.doctor import Diagnosis, Drift, Module, gather, write_diagnosis
from finetune.reporting.doctor import diagnose as judge
from finetune.reporting.doctor.evidence import Loss
from finetune.runs import RunDirectory

Progress = Callable[[str, int], None]


def diagnose(run: RunDirectory, against: Path | None, progress: Progress) -> Diagnosis:
    """What the rules say of ``run``, kept in its doctor.json. ``against``: newer data, on which a finished run is measured for drift."""
    config = load_config(run.config).config
    drift = _drift(run, config, against, progress) if against else "no newer data was given: --against NEW.jsonl"
    diagnosis = judge(gather(run, config, _modules(run, config), drift))
    write_diagnosis(run, diagnosis)
    return diagnosis


def _modules(run: RunDirectory, config: Config) -> list[Module] | str:
    """What the adapter of ``run`` tells of its modules, or why it tells nothing."""
    if why := no_factors(run, config):
        return why
    with loading():
        from finetune.analysis.used_rank import used_ranks  # torch, which a run without an adapter does not need

    try:
        return [Module(one.module, one.role, one.rank, one.effective_rank, one.size) for one in used_ranks(run, config)]
    except VerificationError as error:  # a run with a damaged adapter still has curves
        return error.problems[0].what


def _drift(run: RunDirectory, config: Config, newer: Path, progress: Progress) -> Drift:
    """``run`` on ``newer`` data."""
    with loading():
        from finetune.evaluation.drift import Ratio, compare

    def loss(ratio: Ratio) -> Loss:
        return Loss(ratio.mean, ratio.error)

    found = compare(run, config, newer, progress)
    before, now = found.validation, found.newer
    figures = (before.loss, now.loss, before.gain, now.gain)
    return Drift(str(found.source), before.rows, now.rows, *map(loss, figures))
