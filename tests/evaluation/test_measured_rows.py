"""Rows are read a window at a time, bad ones included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from finetune.config.data import FileSource
from finetune.errors import DataError, Problem
from finetune.evaluation import measured_rows
from finetune.evaluation.measured_rows import row_windows


def test_a_row_with_two_problems_does_not_keep_all_that_follow_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is where the window ends, so that rows and problems together pass its size without ever being equal to it."""
    read = 0

    def rows(_: FileSource) -> Iterator[object]:
        nonlocal read
        for number in range(100):
            read += 1
            bad = DataError.from_problems([Problem("no answer", "a:8", "add one"), Problem("no question", "a:8", "add one")])
            yield bad if number == 7 else {"number": number}

    monkeypatch.setattr(measured_rows, "WINDOW", 8)
    monkeypatch.setattr(measured_rows, "read_rows", rows)
    with pytest.raises(DataError) as caught:
        list(row_windows(FileSource(source="a.jsonl")))
    assert len(caught.value.problems) == 2
    assert read == 8
