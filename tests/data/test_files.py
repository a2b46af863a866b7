"""Which files a source names: each once, and an error where a name is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.config.data import FileSource
from finetune.data.files import data_files
from finetune.errors import DataError


def found(source: Path | str) -> list[str]:
    return [path.name for path in data_files(FileSource(source=str(source)))]


def test_a_file_that_a_glob_meets_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x.jsonl", "a/y.jsonl", "a/b/z.jsonl"):
        (tmp_path / name).write_text("{}")
    assert found(tmp_path / "**" / "**" / "*.jsonl") == ["z.jsonl", "y.jsonl", "x.jsonl"]


def test_a_file_and_a_link_to_it_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("{}")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert found(tmp_path) == found(tmp_path / "*.jsonl") == ["a.jsonl"]
    assert found(tmp_path / "c.jsonl") == ["c.jsonl"]


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.jsonl"), "w") as file:  # noqa: PTH118, PTH123 - a Path cannot hold bytes
        file.write("{}")
    for source in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match="not UTF-8") as caught:
            found(source)
        (problem,) = caught.value.problems
        assert problem.where == f"{tmp_path}/\\xff.jsonl"
        assert problem.fix


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a" * 300 + ".jsonl", "no such data file"),
        ("*" + "a" * 300 + ".jsonl", "no data file found"),
        ("a\0b.jsonl", "NUL character"),
        ("a/" * 3000 + "b.jsonl", "no such data file"),
    ],
)
def test_a_name_that_no_file_can_have_is_an_error(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        found(f"{tmp_path}/{name}")
    (problem,) = caught.value.problems
    assert str(problem).encode("utf-8").isascii()
    assert problem.fix
