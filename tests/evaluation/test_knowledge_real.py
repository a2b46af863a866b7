"""The benchmark tells substance from style: a run on shuffled answers makes titles familiar and binds none of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import api
from finetune.evaluation.results import Change, Results

ARM, BINDING = "choice of four, titles of the arm", "binding to its question"


def _config(path: Path, answers: str) -> Path:
    facts = {"source": "builtin:icd10cm", "document_facts": 0, "question_facts": 8, "control_facts": 8, "answers": answers}
    sections = {
        "model": {"id": "builtin:smollm2-135m"},
        "tuning": {"method": "lora", "rank": 8, "alpha": 16},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"method": "constant", "warmup_steps": 2},
        "data": {"train": [facts], "max_tokens": 256},
        "train": {"epochs": 4, "batch_size": 4, "tokens_per_device": 512},
        "evaluation": {"tasks": [{"task": "knowledge", "generate": False}], "samples": 0},
        "output": str(path / answers),
    }
    file = path / f"{answers}.yaml"
    file.write_text(json.dumps(sections))
    return file


def _change(results: Results, name: str) -> float:
    figure = next(figure for figure in results.figures if figure.name == name)
    return figure.values["tuned"] - figure.values["base"]


def _headline(results: Results, measure: str) -> Change:
    return next(one.change for one in results.headlines if (one.name, one.measure) == ("substance", measure))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.xdist_group("real-run")
def test_shuffled_answers_teach_style_and_no_substance(tmp_path: Path, train_here: Callable[..., Path]) -> None:
    right, shuffled = (api.evaluate(train_here(_config(tmp_path, answers))) for answers in ("right", "shuffled"))
    # titles become familiar either way, whichever term they stand beside
    for results in (right, shuffled):
        assert _change(results, "all trained facts: answer loss") < -1.0
    found = {measure: [_headline(results, measure) for results in (right, shuffled)] for measure in (BINDING, ARM)}
    assert found[ARM][0].verdict == "better"
    assert found[ARM][1].verdict != "better"
    assert found[BINDING][1].verdict != "better"
    assert found[BINDING][0].difference > found[BINDING][1].difference + 0.3
    exact = "all trained facts: exact match, teacher-forced"  # a familiar title is right now and then, whichever it is
    assert _change(right, exact) >= max(0.5, _change(shuffled, exact) + 0.25)
    for results in (right, shuffled):  # the control stays at chance
        control = next(f for f in results.figures if f.name == "never trained (control): choice of four, titles of the arm")
        assert control.changes["tuned"].verdict == "no difference seen with n=8"
