"""What results say of several systems: each trained one against its own base, whatever stands first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evaluation.comparison import Measurement, side_by_side
from finetune.evaluation.conclusions import CONTROL, TRAINED, headlines
from finetune.evaluation.results import Results, read_results
from finetune.evaluation.statistics import ratio
from finetune.runs import RunDirectory

LOSSES = {"base": (5.0, 6.0), "base of nf4": (5.2, 6.3), "plain": (5.1, 6.2), "lora": (3.0, 5.5), "nf4": (4.2, 6.2)}
"""System -> answer loss of trained facts and of the control: LoRA learned 2.0 and 0.5, NF4 1.0 and 0.1 from its own base."""
BASES = {"lora": "base", "nf4": "base of nf4"}
SYSTEMS = {
    "base": {"kind": "base", "of": "lora"},
    "base of nf4": {"kind": "base", "of": "nf4"},
    "plain": {"kind": "model"},
    "lora": {"kind": "run"},
    "nf4": {"kind": "run"},
}


def _measured(seed: int, system: str) -> Measurement:
    """Twenty facts of each arm, which differ by far more than systems do."""
    draw = np.random.default_rng(seed)
    found = []
    for arm, loss in zip((TRAINED, CONTROL), LOSSES[system], strict=True):
        facts = draw.normal(0.0, 1.0, 20)
        own = np.random.default_rng(sorted(LOSSES).index(system)).normal(0.0, 0.01, 20)
        nats = loss + facts - facts.mean() + own - own.mean()
        found.append(ratio(f"{arm}: answer loss", "nats/token", "lower" if arm == TRAINED else "same", (nats, np.ones(20)), range(20)))
    return Measurement(tuple(found))


def _results(*systems: str, bases: dict[str, str] = BASES) -> Results:
    measured = {name: _measured(0, name) for name in systems}
    own = {name: base for name, base in bases.items() if name in systems}
    figures, _ = side_by_side("knowledge", measured, own)
    record = {"systems": {name: SYSTEMS[name] for name in systems}}
    return Results("r", systems, tuple(figures), (), 1.0, (), headlines({"knowledge": measured}, own), record, own)


def test_each_trained_system_is_told_apart_from_its_own_base() -> None:
    found = _results("base", "base of nf4", "plain", "lora", "nf4")
    assert found.headline is not None
    lora, nf4 = found.headline.splitlines()
    assert lora.startswith("lora: The answer loss of trained facts changed by -2.00 nats a token, that of facts never trained by -0.50")
    assert nf4.startswith("nf4: The answer loss of trained facts changed by -1.00 nats a token, that of facts never trained by -0.10")
    assert {(one.system, one.name): round(one.change.difference, 6) for one in found.headlines} == {
        ("lora", "style"): -0.5,
        ("lora", "substance"): -1.5,
        ("nf4", "style"): -0.1,
        ("nf4", "substance"): -0.9,
    }
    trained = found.figures[0]
    changed = {name: round(change.difference, 6) for name, change in trained.changes.items()}
    assert changed == {"base of nf4": 0.2, "plain": 0.1, "lora": -2.0, "nf4": -1.0}
    [(system, between)] = trained.between.items()
    assert (system, round(between.difference, 6), between.verdict) == ("nf4", 1.2, "worse")
    assert between.high is not None
    assert between.low is not None
    assert between.high - between.low < 0.05, "a paired difference: facts differ by one nat"


def test_a_model_beside_a_run_is_not_what_learned() -> None:
    found = _results("base", "plain", "lora")
    assert found.headline is not None
    assert found.headline.startswith("The answer loss of trained facts changed by -2.00")
    assert {one.system for one in found.headlines} == {"lora"}
    assert found.figures[0].between == {}
    assert _results("plain", bases={}).headline is None


def test_of_a_system_without_conclusions_there_is_no_sentence() -> None:
    both = _results("base", "base of nf4", "lora", "nf4")
    one = tuple(headline for headline in both.headlines if headline.system == "lora")
    found = Results("r", both.systems, both.figures, (), 1.0, (), one, both.record, both.bases)
    assert found.headline is not None
    assert "nf4" not in found.headline


def _older(tmp_path: Path, *systems: str) -> Results:
    """As it was written before bases were kept."""
    stored: dict[str, Any] = json.loads(json.dumps(_results(*systems).as_dict()))
    del stored["bases"]
    for figure in stored["figures"]:
        del figure["between"]
    run = RunDirectory(tmp_path)
    run.evaluations.mkdir(exist_ok=True)
    run.results.write_text(json.dumps(stored))
    found = read_results(run)
    assert found is not None
    return found


def test_older_files_are_read_and_say_no_more_than_they_know(tmp_path: Path) -> None:
    assert _older(tmp_path, "base", "lora").trained == {"lora": "base"}
    assert _older(tmp_path, "base", "plain", "lora").trained == {"lora": "base"}
    several = _older(tmp_path, "base", "base of nf4", "lora", "nf4")
    assert several.trained == {}
    assert several.headline is None
