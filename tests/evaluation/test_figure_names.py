"""Figures are called what is foretold of them: names are checked before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import api
from finetune.config.figure_names import VALIDATION_LOSS, figure_names, general_name
from finetune.config.load import load_config


@pytest.fixture
def tasks(questions_file: Path, tmp_path: Path) -> list[dict[str, object]]:
    """Every task, with every figure that it can have."""
    pytest.importorskip("simple_icd_10_cm")
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Title 3"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    return [
        {"task": "loss"},
        {"task": "loss", "name": "mine", "data": {"source": str(rows)}},
        {"task": "generate", "data": {"source": str(rows)}, "metrics": ["exact-match", "token-f1", "regex", "json"], "pattern": "a"},
        {"task": "choices", "data": {"source": str(questions_file)}},
        {"task": "knowledge", "asks": ["knowledge", "memory", "reversed"], "controls": ["open-book"]},
        {"task": "forgetting"},
    ]


@pytest.mark.slow
def test_a_run_has_the_figures_that_are_foretold(
    write_config: Callable[..., Path], chat_file: Path, tasks: list[dict[str, object]]
) -> None:
    facts = {"source": "builtin:icd10cm", "document_facts": 8, "question_facts": 8, "control_facts": 8}
    data = {"train": [facts], "validation": [{"source": str(chat_file)}], "max_tokens": 512}
    train = {"max_steps": 1, "batch_size": 2, "precision": "fp32", "tokens_per_device": 1024}
    config = load_config(write_config(data=data, train=train, evaluation={"tasks": tasks})).config
    found = api.evaluate(api.train(config).path)
    had = {general_name(figure.name) for figure in found.figures} | {f"{one.name}: {one.measure}" for one in found.headlines}
    foretold = figure_names(config)
    assert foretold is not None
    assert had | {VALIDATION_LOSS} | {name for name in foretold if name.startswith("efficiency")} == foretold
