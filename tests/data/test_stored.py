"""Rows in a file of the run: what is read is what was written, and rows that are not asked for take no memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.data.examples import Examples
from finetune.data.render import Example
from finetune.data.stored import load_rows, save_rows
from finetune.errors import VerificationError


def rows(count: int, longest: int = 40) -> list[Example]:
    """Of every length up to ``longest``, with ids that no byte holds."""
    drawn = random.Random(7)
    found = []
    for number in range(count):
        length = 2 + number % (longest - 1)
        mask = (False, *(drawn.random() < 0.5 for _ in range(length - 1)))
        found.append(Example(tuple(drawn.choices(range(257, 50_000), k=length)), mask, f"file:{number}"))
    return found


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, list[Example]]:
    """A file of 1,100 validation rows, and the rows."""
    written = rows(1100)  # more than are counted at once, twice
    save_rows(tmp_path / "rows.safetensors", Examples.of([]), Examples.of(written))
    return tmp_path / "rows.safetensors", written


def test_what_is_read_is_what_was_written(stored: tuple[Path, list[Example]]) -> None:
    path, written = stored
    read, is_validation = load_rows(path)
    assert is_validation
    assert [(row.ids, row.mask) for row in read] == [(row.ids, row.mask) for row in written]
    assert read.lengths.tolist() == [len(row.ids) for row in written]
    assert read.supervised.tolist() == [sum(row.mask) for row in written]
    assert [read[0].where, read.where(1099)] == ["validation row 1", "validation row 1100"]
    assert type(read[5].ids[0]) is int
    assert [row.ids for row in read[-3:]] == [row.ids for row in written[-3:]]
    assert read[-1].where == "validation row 1100"


def test_without_validation_rows_the_first_of_training_are_kept(tmp_path: Path) -> None:
    written = rows(100)
    save_rows(tmp_path / "rows", Examples.of(written), Examples.of([]))
    read, is_validation = load_rows(tmp_path / "rows")
    assert not is_validation
    assert [row.ids for row in read] == [row.ids for row in written[:64]]
    assert read[0].where == "training row 1"


@pytest.mark.parametrize("count", [1000, 10_000])
def test_b5_rows_take_no_memory_until_they_are_asked_for(tmp_path: Path, count: int) -> None:
    save_rows(tmp_path / "rows", Examples.of([]), Examples.of(rows(count, 200)))
    tracemalloc.start()
    try:
        read, _ = load_rows(tmp_path / "rows")
        total = sum(len(row.ids) for row in read)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == read.lengths.sum() > 100 * count
    assert peak < 2**18 + 64 * count  # bytes: at 10,000 rows less than one for each token


def test_damage_is_told_when_the_file_is_opened(stored: tuple[Path, list[Example]]) -> None:
    path, _ = stored
    tensors = load_file(path)
    with pytest.raises(VerificationError, match="cannot read the run's rows"):
        load_rows(path.with_name("missing"))
    for change in ({"lengths": tensors["lengths"][:-1]}, {"mask": tensors["mask"][:-1]}, {"lengths": np.r_[tensors["lengths"], 0]}):
        save_file(tensors | change, path, {"kind": "validation"})
        with pytest.raises(VerificationError, match="are not those of their tokens"):
            load_rows(path)
    save_file(tensors, path)
    with pytest.raises(VerificationError, match="kind"):
        load_rows(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationError, match="cannot read"):
        load_rows(path)


def test_damage_after_that_is_told_when_the_row_is_read(stored: tuple[Path, list[Example]]) -> None:
    path, _ = stored
    read, _ = load_rows(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VerificationError, match="ends too early"):
        list(read)
    path.unlink()
    with pytest.raises(VerificationError, match="No such file"):
        _ = read[0]
