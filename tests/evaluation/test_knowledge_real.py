"""The benchmark tells substance from style: a run on shuffled answers makes titles familiar and binds none of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import api
from finetune.evaluation.results import Results

FACTS = 6


def _config(path: Path, answers: str) -> Path:
    facts = {"source": "builtin:icd10cm", "document_facts": 0, "question_facts": FACTS, "control_facts": 4, "answers": answers}
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


def _values(results: Results, measure: str) -> tuple[float, float, float]:
    """Of the trained facts: before training, after it on right answers, and on shuffled ones."""
    values = next(figure.values for figure in results.figures if figure.name == f"all trained facts: {measure}")
    return values["base"], values["right"], values["shuffled"]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.xdist_group("real-run")
def test_shuffled_answers_teach_style_and_no_substance(tmp_path: Path, train_here: Callable[..., Path]) -> None:
    right, shuffled = (train_here(_config(tmp_path, answers)) for answers in ("right", "shuffled"))
    results = api.evaluate(right, [shuffled])
    # Both have read the titles: each is likelier than before, and preferred to titles never read, whichever term it stood beside.
    base, *tuned = _values(results, "answer loss")
    assert max(tuned) < base - 1.0
    assert min(_values(results, "choice of four, near titles")[1:]) > 0.5
    # Only one has read which title is whose. Of titles that are all familiar it prefers the right one; the other has no way to know it.
    _, bound, loose = _values(results, "choice of four, titles of the arm")
    assert bound > 0.5 >= loose
    _, bound, loose = _values(results, "exact match, teacher-forced")
    assert bound >= loose + 2 / FACTS
    _, bound, loose = _values(results, "binding to its question")
    assert bound > max(loose, 0.0)
