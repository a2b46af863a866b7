"""Every broken input of `bad/` gets its place, the reason and a fix, exit code 3, and leaves nothing in the cache."""

from __future__ import annotations

import shutil
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
    assert problem.where.endswith(case["where"])
    assert str(problem).encode()  # half a surrogate pair could not be printed
    assert not prepared(cache)


MIB = 2**20


@pytest.mark.parametrize(
    ("name", "text", "where", "reason"),
    [
        ("line.jsonl", '{"question": "a", "answer": "' + "x" * 10 * MIB + '"}\n', ":2", "the line is longer than 8 MiB"),
        ("line.csv", "a," + "x" * 10 * MIB + "\n", ":2", "the line is longer than 8 MiB"),
        ("quote.csv", 'a,"' + ("x" * 99 + "\n") * (MIB // 10), ":2", "the row is longer than 8 MiB"),
        ("row.json", '{"question": "a", "answer": "' + "x" * 10 * MIB + '"}\n]', ":2 row 2", "the row is longer than 8 MiB"),
        ("list.json", "[" * 9 * MIB, ":1", "the JSON is nested too deeply"),
        ("document.txt", "word " * 2 * MIB, ".txt", "the document is longer than 8 MiB"),
    ],
)
def test_rows_that_would_fill_memory(tmp_path: Path, renderer: Renderer, name: str, text: str, where: str, reason: str) -> None:
    start = {"line.jsonl": '{"question": "a", "answer": "b"}\n', "row.json": '[{"question": "a", "answer": "b"},\n'}
    path = tmp_path / name
    path.write_text((start.get(name) or ("question,answer\n" if name.endswith("csv") else "")) + text)
    problem = problem_of(path, renderer)
    assert problem.what.startswith(reason)
    assert problem.where.endswith(where)
    assert problem.fix


BOMBS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "output": "{% set ns = namespace(x='x' * 1000) %}{% for a in range(99999) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "escape": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "syntax": "{% for m in messages %}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_c5_template_bombs(tiny_tokenizer_dir: Path, tmp_path: Path, cache: Path, bomb: str) -> None:
    directory = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer_dir, directory)
    (directory / "chat_template.jinja").write_text(BOMBS[bomb])
    path = tmp_path / "chat.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    data = Data.model_validate({"train": [{"source": str(path)}], "max_tokens": 512})
    with pytest.raises(DataError, match="the chat template") as caught:
        prepare(data, Renderer(AutoTokenizer.from_pretrained(directory)), seed=0)
    assert caught.value.problems[0].fix
    assert not prepared(cache)


# A command takes seconds to start: each gets several broken files, and must name them all.
COMMANDS = [
    ["truncated.jsonl", "latin1.jsonl", "nul-bytes.jsonl", "nested-nulls.jsonl", "duplicate-key.jsonl", "role-typo.jsonl"],
    ["missing-answer.jsonl", "control-token.jsonl", "surrogate.jsonl", "depth-bomb.json", "ragged.csv", "duplicate-header.csv"],
    ["truncated.parquet", "garbage.arrow", "truncated.jsonl.zst", "empty.txt", "mapped-to-missing.jsonl", "cut-between-rows.json"],
    ["wrong-suffix.yaml"],  # found before any file is read
]


@pytest.mark.parametrize("names", COMMANDS, ids=["rows", "content", "files", "names"])
def test_bad_inputs_end_the_command_with_3(
    names: list[str], write_config: Callable[..., Path], finetune: Callable[..., Any], cache: Path
) -> None:
    cases = [case for case in CASES if case["file"] in names]
    assert len(cases) == len(names)
    config = write_config(data={"train": [{"source": str(BAD / case["file"]), **source_of(case)} for case in cases], "max_tokens": 512})
    done = finetune("data", "stats", config, "--json", FINETUNE_CACHE=str(cache), COLUMNS="1000")
    assert done.code == 3, done.err
    assert not done.out
    assert "Traceback" not in done.err
    for case in cases:
        assert case["reason"] in done.err
        assert case["fix"] in done.err
        assert f"{BAD / case['file']}{case['where'].removeprefix(case['file'])}" in done.err
    assert not prepared(cache)
