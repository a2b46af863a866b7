"""Splits, weights, over-long rows and overlap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.config.schema import Data
from finetune.data.prepare import prepare
from finetune.data.render import Renderer
from finetune.errors import DataError


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer_dir: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))


def rows(path: Path, answers: list[str]) -> Path:
    path.write_text("".join(json.dumps({"question": f"Question {answer}?", "answer": answer}) + "\n" for answer in answers))
    return path


def data(*paths: Path, **settings: object) -> Data:
    sources = [{"source": str(path)} for path in paths]
    return Data.model_validate({"train": sources, "max_tokens": 64, **settings})


def test_a15_equal_rows_land_on_one_side(tmp_path: Path, renderer: Renderer) -> None:
    path = rows(tmp_path / "a.jsonl", [str(n % 30) for n in range(90)])
    prepared = prepare(data(path, validation={"fraction": 0.3}), renderer, seed=1)
    train, validation = ({e.content_hash() for e in part} for part in (prepared.train, prepared.validation))
    assert train
    assert validation
    assert not train & validation
    assert len(train | validation) == 30
    assert prepared.counts["duplicate rows"] == len(prepared.train) - len(train)


def test_a15_split_does_not_depend_on_repetition(tmp_path: Path, renderer: Renderer) -> None:
    path = rows(tmp_path / "a.jsonl", [str(n) for n in range(40)])
    once = prepare(data(path, validation={"fraction": 0.3}), renderer, seed=1)
    settings = Data.model_validate({"train": [{"source": str(path), "weight": 2.5}], "validation": {"fraction": 0.3}, "max_tokens": 64})
    often = prepare(settings, renderer, seed=1)
    assert {e.content_hash() for e in once.validation} == {e.content_hash() for e in often.validation}
    assert len(often.train) == 2 * len(once.train) + round(0.5 * len(once.train))


def test_a15_overlap_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    train = rows(tmp_path / "a.jsonl", ["1", "2", "3"])
    other = rows(tmp_path / "b.jsonl", ["9", "2"])
    with pytest.raises(DataError, match="also a training row") as caught:
        prepare(data(train, validation=[{"source": str(other)}]), renderer, seed=0)
    assert "b.jsonl:2" in caught.value.problems[0].where
    assert "a.jsonl:2" in caught.value.problems[0].where


def test_overlong_rows_follow_the_policy(tmp_path: Path, renderer: Renderer) -> None:
    path = rows(tmp_path / "a.jsonl", ["1", "x" * 300])
    with pytest.raises(DataError, match="max_tokens") as caught:
        prepare(data(path), renderer, seed=0)
    assert caught.value.problems[0].where.endswith("a.jsonl:2")
    dropped = prepare(data(path, overlong="drop"), renderer, seed=0)
    assert (len(dropped.train), dropped.counts["dropped: over-long"]) == (1, 1)


def test_a1_truncation_that_leaves_no_supervised_token_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "long " * 100, "answer": "x"}) + "\n")
    with pytest.raises(DataError, match="no token that carries loss"):
        prepare(data(path, overlong="truncate"), renderer, seed=0)


def test_a9_the_fingerprint_follows_every_input(tmp_path: Path, renderer: Renderer) -> None:
    path = rows(tmp_path / "a.jsonl", [str(n) for n in range(20)])
    prints = {
        prepare(data(path), renderer, seed=0).fingerprint,
        prepare(data(path, supervise="all"), renderer, seed=0).fingerprint,
        prepare(data(path, validation={"fraction": 0.2}), renderer, seed=0).fingerprint,
        prepare(data(path, validation={"fraction": 0.2}), renderer, seed=1).fingerprint,
    }
    rows(path, [str(n) for n in range(19)] + ["changed"])
    prints.add(prepare(data(path), renderer, seed=0).fingerprint)
    assert len(prints) == 5


def test_a_weight_of_a_validation_source_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    train, other = rows(tmp_path / "a.jsonl", ["1", "2"]), rows(tmp_path / "b.jsonl", ["8", "9"])
    with pytest.raises(DataError, match="has the weight 2") as caught:
        prepare(data(train, validation=[{"source": str(other), "weight": 2}]), renderer, seed=0)
    problem = caught.value.problems[0]
    assert (problem.where, problem.fix) == (str(other), "remove weight from validation sources")
    assert len(prepare(data(train, validation=[{"source": str(other), "weight": 1}]), renderer, seed=0).validation) == 2


def test_a_weight_that_rounds_a_source_away_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    paths = [rows(tmp_path / "a.jsonl", ["1", "2"]), rows(tmp_path / "b.jsonl", ["6", "7", "8", "9"])]

    def weighted(weight: float) -> Data:
        return Data.model_validate({"train": [{"source": str(paths[0])}, {"source": str(paths[1]), "weight": weight}], "max_tokens": 64})

    with pytest.raises(DataError, match=r"the weight 0\.1 of 4 training") as caught:
        prepare(weighted(0.1), renderer, seed=0)
    assert caught.value.problems[0].where == str(paths[1])
    assert caught.value.problems[0].fix
    assert len(prepare(weighted(0.25), renderer, seed=0).train) == 3


def test_a_training_source_without_rows_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    full, overlong, empty = rows(tmp_path / "a.jsonl", ["1"]), rows(tmp_path / "b.jsonl", ["x" * 300]), rows(tmp_path / "c.jsonl", [])
    for path in (overlong, empty):
        with pytest.raises(DataError, match="gives no row") as caught:
            prepare(data(full, path, overlong="drop"), renderer, seed=0)
        assert caught.value.problems[0].where == str(path)


def test_a_source_whose_rows_are_all_drawn_for_validation_is_accepted(tmp_path: Path, renderer: Renderer) -> None:
    many, one = rows(tmp_path / "a.jsonl", [str(n) for n in range(20)]), rows(tmp_path / "b.jsonl", ["only"])
    sides = [prepare(data(many, one, validation={"fraction": 0.4}), renderer, seed=seed) for seed in range(8)]
    assert any(example.where == f"{one}:1" for prepared in sides for example in prepared.validation)
