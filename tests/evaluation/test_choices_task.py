"""Multiple choice on rows of one's own: rows of every spelling, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import ChoicesTask
from finetune.data.render import Renderer
from finetune.errors import DataError
from finetune.evaluation.choices_task import measure, question_windows
from finetune.scoring import Scorer


def task(source: Path, **settings: Any) -> ChoicesTask:
    data = {"source": str(source), **settings.pop("data", {})}
    return ChoicesTask.model_validate({"task": "choices", "data": data, **settings})


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def rows(*values: dict[str, Any]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in values))
        return path

    return rows


def test_the_right_choice_is_its_text_its_number_or_its_letter(write: Any) -> None:
    row = {"question": "Which?", "choices": ["one", "two", "B"]}
    path = write(*({**row, "answer": answer} for answer in ("two", 1, "A", "B")))
    (questions,) = question_windows(task(path))
    assert [one.right for one in questions] == [1, 1, 0, 2]  # a letter that is a choice itself means that choice


def test_columns_have_other_names(write: Any) -> None:
    path = write({"q": "Which?", "options": ["one", "two"], "label": 1})
    (questions,) = question_windows(task(path, data={"columns": {"question": "q", "choices": "options", "answer": "label"}}))
    assert questions[0].choices == ("one", "two")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": 2}, "none of the 2 choices"),
        ({"answer": True}, "none of the 2 choices"),
        ({"answer": "three"}, "none of the 2 choices"),
        ({"answer": None}, "lacks 'answer'"),
        ({"choices": ["one"]}, "at least two"),
        ({"choices": "one, two"}, "must be a list"),
        ({"choices": ["one", "one"]}, "the same"),
        ({"question": " "}, "not empty"),
        ({"question": "a\0b"}, "NUL"),
    ],
)
def test_rows_that_cannot_be_asked_have_three_parts(write: Any, changes: dict[str, Any], said: str) -> None:
    path = write({"question": "Which?", "choices": ["one", "two"], "answer": 0} | changes)
    with pytest.raises(DataError, match=said) as caught:
        list(question_windows(task(path)))
    problem = caught.value.problems[0]
    assert problem.where.endswith("rows.jsonl:1")
    assert problem.fix


@pytest.mark.parametrize("style", ["chat", "text"])
def test_figures_and_chance(fp32: Scorer, tokens: Renderer, questions_file: Path, style: str) -> None:
    found = measure(fp32, tokens, "own", task(questions_file, style=style), lambda _: None)
    assert [one.name for one in found.quantities] == [
        "own: accuracy (chance 37%)",
        "own: accuracy, length-normalized (chance 37%)",
        "own: loss of the right answer",
    ]
    assert all(one.n == 13 for one in found.quantities)
