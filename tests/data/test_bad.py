"""Every broken input of `bad/` gets its place, the reason and a fix, exit code 3, and leaves nothing in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from finetune.config.schema import Data
from finetune.data.prepare import prepare
from finetune.data.render import Renderer
from finetune.errors import DataError, Problem

BAD = Path(__file__).parent / "bad"
CASES: list[dict[str, Any]] = yaml.safe_load((BAD / "index.yaml").read_text())


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer_dir: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("FINETUNE_CACHE", str(directory))
    return directory


def problem_of(path: Path, renderer: Renderer, **source: object) -> Problem:
    """The one problem that preparation finds in ``path``."""
    data = Data.model_validate({"train": [{"source": str(path), **source}], "max_tokens": 512})
    with pytest.raises(DataError) as caught:
        prepare(data, renderer, seed=0)
    assert len(caught.value.problems) == 1, caught.value
    return caught.value.problems[0]


def prepared(cache: Path) -> list[Path]:
    """What lies in the cache of prepared data, locks aside."""
    return [path for path in (cache / "prepared").rglob("*") if path.is_file() and path.suffix != ".lock"]


def source_of(case: dict[str, Any]) -> dict[str, Any]:
    return {key: case[key] for key in ("format", "columns") if key in case}


def test_the_index_names_every_file() -> None:
    assert {case["file"] for case in CASES} - {"absent.jsonl"} == {path.name for path in BAD.iterdir()} - {"index.yaml"}
    assert len(CASES) >= 100


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["file"]))
def test_bad_inputs(case: dict[str, Any], renderer: Renderer, cache: Path) -> None:
    path = BAD / case["file"]
    problem = problem_of(path, renderer, **source_of(case))
    assert case["reason"] in problem.what
    assert case["fix"] in problem.fix
    assert problem.where.startswith(str(path))
    assert problem.where.endswith(case["where"]) or (case["where"].endswith(":") and case["where"] in problem.where)
    assert str(problem).encode()  # half a surrogate pair could not be printed
    assert not prepared(cache)
