"""The standard error of a loss over rows, against the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.evaluation.drift import ratio


def test_the_error_of_a_ratio_is_that_of_the_bootstrap() -> None:
    """Rows are drawn as a whole: 2,000 draws of 80 rows with replacement, numpy's own generator."""
    draw = np.random.default_rng(0)
    counts = draw.integers(5, 40, 80)
    sums = counts * draw.normal(1.5, 0.4, 80)
    found = ratio(sums.tolist(), counts.tolist())
    rows = draw.integers(0, 80, (2000, 80))
    means = sums[rows].sum(1) / counts[rows].sum(1)
    assert found.mean == pytest.approx(sums.sum() / counts.sum(), rel=1e-12)
    assert found.error == pytest.approx(means.std(), rel=0.06)


def test_rows_of_one_length_have_the_error_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(2.0, 0.5, 30)
    assert ratio((values * 7).tolist(), [7] * 30).error == pytest.approx(values.std(ddof=1) / np.sqrt(30), rel=1e-12)
