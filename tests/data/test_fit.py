"""How well max_tokens fits: shares, a round suggestion, and a histogram whose bins hold every length once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from finetune.data.fit import fit, histogram
from finetune.data.report import DataReport, SourceReport


def report(max_tokens: int, rows: int, over_long: int, longest: int = 0) -> DataReport:
    source = SourceReport("a.jsonl", "training", 1.0, rows, rows, 0, 0, over_long=over_long, longest_row=longest)
    return DataReport(max_tokens, (source,))


def test_shares_above_parts_of_the_limit() -> None:
    found = fit(np.array([10, 50, 51, 76, 95, 100], np.int32), report(100, 6, 0))
    assert found.above == {"50%": pytest.approx(4 / 6), "75%": 0.5, "90%": pytest.approx(2 / 6), "100%": pytest.approx(1 / 6)}
    assert (found.longest, found.suggested, found.over_long) == (100, 100, 0.0)


def test_the_suggestion_is_round_and_holds_the_longest() -> None:
    assert fit(np.array([5, 65], np.int32), report(2048, 2, 0)).suggested == 128
    assert fit(np.array([64], np.int32), report(2048, 1, 0)).suggested == 64


def test_the_suggestion_holds_rows_that_were_too_long_to_be_kept() -> None:
    found = fit(np.array([5, 65], np.int32), report(128, 4, 2, longest=300))
    assert (found.suggested, found.longest, found.over_long) == (320, 300, 0.5)


@pytest.mark.parametrize("lengths", [[7], [1, 2, 3], [3, 3, 900], list(range(1, 2049)), [17, 23, 99, 100, 101]])
def test_every_length_is_in_one_bin(lengths: list[int]) -> None:
    bars = histogram(np.array(lengths, np.int32), bins=12)
    assert sum(count for _, _, count in bars) == len(lengths)
    assert len(bars) <= 13
    for low, high, count in bars:
        assert count == sum(low <= length <= high for length in lengths)
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(bars))
