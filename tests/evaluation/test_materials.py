"""Whose facts are asked, and of whom these say nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config.evaluation import Evaluation, KnowledgeTask
from finetune.config.schema import Config
from finetune.evaluation.materials import trained_on_others
from finetune.evaluation.request import Request
from finetune.evaluation.targets import Target

pytest.importorskip("simple_icd_10_cm")
SMALL = {"source": "builtin:icd10cm", "document_facts": 4, "question_facts": 4, "control_facts": 4}


def _config(*sources: dict[str, Any]) -> Config:
    content = {"model": {"id": "m"}, "tuning": {"method": "lora"}, "data": {"train": list(sources)}, "output": "o"}
    return Config.model_validate(content)


def _asked(others: dict[str, Config], *plain: Target, task: KnowledgeTask | None = None) -> tuple[set[str], list[str]]:
    """What is said of ``others`` beside a run that was trained on `SMALL`."""
    configs = {"first": _config(SMALL)} | others
    targets = (*(Target(name, "run", name) for name in configs), *plain)
    request = Request(targets, configs, Evaluation(), Path("results.json"))
    return trained_on_others(request, task or KnowledgeTask(task="knowledge"))


@pytest.mark.parametrize(
    "change", [{"replay": 0.2}, {"weight": 2.0}, {"answers": "shuffled"}, {"relations": ["inclusion-term", "excludes"]}]
)
def test_what_does_not_change_who_knows_what_is_the_same_benchmark(change: dict[str, Any]) -> None:
    assert _asked({"second": _config(SMALL | change)}) == (set(), [])


@pytest.mark.parametrize("change", [{"seed": 1}, {"question_facts": 3}, {"chapters": ["E", "I"]}, {"relations": ["title-code"]}])
def test_a_run_of_other_facts_is_not_judged_by_these(change: dict[str, Any]) -> None:
    others, [note] = _asked({"second": _config(SMALL | change)})
    assert others == {"second"}
    assert note.startswith("second: it was not trained on the facts that are asked, those of first")


def test_a_run_of_no_facts_and_an_adapter_are_told_and_a_model_needs_no_word() -> None:
    rows = {"source": "rows.jsonl"}
    others, notes = _asked({"rows": _config(rows)}, Target("a", "adapter", "a"), Target("m", "model", "m"))
    assert others == {"rows"}
    assert [note.partition(":")[0] for note in notes] == ["rows", "a"]
    assert "is not known; it is judged by the facts of first" in notes[1]


def test_shuffled_answers_beside_right_ones_are_other_arms() -> None:
    more = SMALL | {"seed": 1}
    both = {"first": _config(SMALL, more), "second": _config(SMALL, more | {"answers": "shuffled"})}
    assert _asked(both)[0] == {"second"}
