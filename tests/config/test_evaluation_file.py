"""Files for `finetune eval --config`: an evaluation section alone, with every problem told at its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.evaluation_file import load_evaluation
from finetune.config.schema import Evaluation, GenerateTask, HarnessTask
from finetune.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "eval.yaml"
    path.write_text(text)
    return path


def test_paths_start_at_the_file_and_names_stay(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "evaluation:\n  tasks:\n  - {task: generate, data: {source: rows.jsonl}}\n  - {task: harness, tasks: [arc_easy, own/task.yaml]}\n",
    )
    answers, harness = load_evaluation(path).tasks
    assert isinstance(answers, GenerateTask)
    assert answers.data.source == str(tmp_path / "rows.jsonl")
    assert isinstance(harness, HarnessTask)
    assert harness.tasks == ("arc_easy", str(tmp_path / "own" / "task.yaml"))


def test_overrides_lie_over_the_file_or_over_the_default(tmp_path: Path) -> None:
    assert load_evaluation(None) == Evaluation()
    assert load_evaluation(None, ["evaluation.samples=7"]).samples == 7
    path = written(tmp_path, "evaluation: {samples: 2}\n")
    assert load_evaluation(path, ["evaluation.samples=9"]).samples == 9


def test_every_problem_is_told_at_its_line(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "model: {id: owner/name}\nevaluation:\n  sampels: 2\n  tasks:\n  - {task: generate}\n  - {task: perplexity}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_evaluation(path)
    told = [(problem.what, problem.where.rsplit(":", 2)[1]) for problem in caught.value.problems]
    assert [line for _, line in told] == ["1", "3", "5", "6"]
    assert "`model` does not belong" in told[0][0]
    assert "sampels" in told[1][0]
    assert all(problem.fix for problem in caught.value.problems)


@pytest.mark.parametrize("text", ["", "- a\n", "evaluation: {tasks: [{task: loss}, {task: loss}]}\n"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_evaluation(written(tmp_path, text))


def test_the_example_of_the_page_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "eval.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    tasks = load_evaluation(written(tmp_path, example)).tasks
    assert [task.task for task in tasks] == ["loss", "loss", "generate", "choices", "forgetting"]
