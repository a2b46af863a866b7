"""Which rows are on which side, where rows are equal in part: by their tokens, or by what carries loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune.config.schema import Data
from finetune.data.prepare import PreparedData, prepare
from finetune.data.render import Renderer
from finetune.errors import DataError


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer_dir: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))


def pair(answer: str) -> dict[str, Any]:
    return {"question": "What?", "answer": answer}


def talk(*weights: int) -> dict[str, Any]:
    """The same words whatever the weights are."""
    turns: list[dict[str, Any]] = []
    for number, weight in enumerate(weights):
        turns += [{"role": "user", "content": f"Q{number}"}, {"role": "assistant", "content": f"A{number}", "weight": weight}]
    return {"messages": turns}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data(path: Path, **settings: object) -> Data:
    return Data.model_validate({"train": [{"source": str(path)}], "max_tokens": 128, "near_duplicates": "ignore", **settings})


def lines(prepared: PreparedData) -> list[int]:
    """Line numbers on both sides."""
    return [int(example.where.rsplit(":", 1)[1]) for side in (prepared.train, prepared.validation) for example in side]


@pytest.mark.parametrize("duplicates", ["drop", "error"])
def test_a_copy_whose_twin_was_left_out_of_validation_stays(tmp_path: Path, renderer: Renderer, duplicates: str) -> None:
    """Two long rows that are alike once they are cut may be drawn for different sides; one of them is kept, wherever."""
    twins = [pair("x" * 400 + str(number)) for number in (1, 2)]
    path = written(tmp_path / "a.jsonl", *twins, *(pair(str(number)) for number in range(10)))
    cut = {"overlong": "truncate", "validation": {"fraction": 0.4}}
    parted = 0
    for seed in range(12):
        kept = prepare(data(path, **cut), renderer, seed)
        if {1, 2} <= set(lines(kept)):  # both are on the training side
            continue
        assert not kept.report.finding("duplicate rows").count
        parted += kept.report.dropped["validation copy"]
        assert len({1, 2} & set(lines(prepare(data(path, duplicates=duplicates, **cut), renderer, seed)))) == 1
    assert parted > 2


def test_a15_rows_that_differ_in_weight_alone_land_on_one_side(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "a.jsonl"
    rows = [row for number in range(20) for row in (talk(1, 1), talk(0, 1))]
    for number, row in enumerate(rows):
        row["messages"][0]["content"] += f" of {number // 2}"
    prepared = prepare(data(written(path, *rows), validation={"fraction": 0.4}), renderer, seed=1)
    train, validation = ({example.ids for example in side} for side in (prepared.train, prepared.validation))
    assert train
    assert validation
    assert not train & validation
    assert len(prepared.train) == 2 * len(train)  # both are trained on: they teach different tokens
    assert not prepared.report.finding("duplicate rows").count


def test_a15_overlap_is_found_whatever_carries_loss(tmp_path: Path, renderer: Renderer) -> None:
    train, other = written(tmp_path / "a.jsonl", pair("1"), talk(1, 1)), written(tmp_path / "v.jsonl", pair("2"), talk(0, 1))
    with pytest.raises(DataError, match="also a training row") as caught:
        prepare(data(train, validation=[{"source": str(other)}]), renderer, seed=0)
    assert [problem.where for problem in caught.value.problems] == [f"{other}:2 and {train}:2"]


def test_rows_that_no_weight_draws_are_counted(tmp_path: Path, renderer: Renderer) -> None:
    path = written(tmp_path / "a.jsonl", *(pair(str(number)) for number in range(10)))
    prepared = prepare(data(path, train=[{"source": str(path), "weight": 0.3}]), renderer, seed=0)
    assert (len(prepared.train), prepared.report.dropped) == (3, {"drawn by no weight": 7})
    assert prepared.counts["dropped: drawn by no weight"] == 7
    assert not prepare(data(path, train=[{"source": str(path), "weight": 1.3}]), renderer, seed=0).report.dropped


def test_columns_that_become_nothing_are_counted(tmp_path: Path, renderer: Renderer) -> None:
    rows = [pair(str(number)) | {"context": "important"} for number in range(3)] + [pair("9") | {"weight": 0, "system": "Be brief."}]
    path, mapped = written(tmp_path / "a.jsonl", *rows), written(tmp_path / "b.jsonl", {"q": "Hm?", "answer": "Yes", "question": "unused"})
    sources = [{"source": str(path)}, {"source": str(mapped), "columns": {"question": "q"}}]
    report = prepare(data(path, train=sources), renderer, seed=0).report
    assert [source.unused for source in report.sources] == [{"context": 3, "weight": 1}, {"question": 1}]


def test_names_of_columns_that_are_data_are_not_all_kept(tmp_path: Path, renderer: Renderer) -> None:
    rows = [pair(str(number)) | {f"key {number} " + "k" * 200: 1} for number in range(120)]
    (source,) = prepare(data(written(tmp_path / "a.jsonl", *rows)), renderer, seed=0).report.sources
    assert len(source.unused) == 50
    assert max(map(len, source.unused)) == 80
