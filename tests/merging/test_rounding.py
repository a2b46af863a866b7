"""Rounding by chance: right on average, always one of both neighbours, the same for the same seed whatever is rounded at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import VerificationError
from finetune.merging.rounding import DoesNotFitError, rounded, rounded_rows

BF16, FP16 = torch.bfloat16, torch.float16
COUNT = 1 << 16


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest value of ``dtype`` that is not above ``value`` and the smallest that is not below, by stepping from the nearest one."""
    nearest = torch.tensor(value, dtype=dtype)
    infinity = torch.tensor(math.inf, dtype=dtype)
    low = nearest if nearest.double() <= value else torch.nextafter(nearest, -infinity)
    high = nearest if nearest.double() >= value else torch.nextafter(nearest, infinity)
    return float(low), float(high)


@settings(max_examples=60, deadline=None)
@given(st.floats(-6e4, 6e4, width=32), st.sampled_from([BF16, FP16]), st.integers(0, 1000))
def test_the_mean_is_the_exact_value(value: float, dtype: torch.dtype, seed: int) -> None:
    if 0 < abs(value) < 1e-7:
        return  # in fp16 below its smallest value, where the mean of 65,536 draws says little
    found = rounded(torch.full((COUNT,), value), dtype, "a", "stochastic", seed).double()
    low, high = neighbours(value, dtype)
    assert set(found.unique().tolist()) <= {low, high}
    # the mean of COUNT draws between two values a step apart: five standard deviations
    assert abs(float(found.mean()) - value) <= 5 * (high - low) / 2 / math.sqrt(COUNT)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_values_of_the_type_stay_and_zero_keeps_its_sign(dtype: torch.dtype) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)).to(dtype).float()
    values[:2] = torch.tensor([0.0, -0.0])
    assert torch.equal(rounded(values, dtype, "a", "stochastic", 3).float(), values)


def test_a_lost_update_is_kept_on_average() -> None:
    """The pitfall itself: a base on bf16's grid, and updates of a twentieth of its step."""
    base = torch.randn(64, 4096, generator=torch.Generator().manual_seed(2)).to(BF16).float()
    step = 2.0 ** (base.abs().log2().floor() - 7)
    update = 0.05 * step
    inputs = torch.ones(4096)
    exact = (update @ inputs).double()
    nearest = (rounded(base + update, BF16, "w").float() - base) @ inputs
    chance = (rounded(base + update, BF16, "w", "stochastic").float() - base) @ inputs
    assert nearest.abs().max() == 0
    assert float(chance.double().sum() / exact.sum()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_chance_follows_seed_name_and_place_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(40, 33, generator=torch.Generator().manual_seed(3))
    found = rounded(values, dtype, "a", "stochastic", 5)
    assert not torch.equal(found, rounded(values, dtype, "a", "stochastic", 6))
    assert not torch.equal(found, rounded(values, dtype, "b", "stochastic", 5))
    places = torch.tensor([0, 7, 39])
    assert torch.equal(rounded_rows(values[places], places, dtype, "a", "stochastic", 5), found[places])
    monkeypatch.setattr("finetune.merging.rounding._AT_ONCE", 100)
    assert torch.equal(rounded(values, dtype, "a", "stochastic", 5), found)


@pytest.mark.parametrize("way", ["nearest", "stochastic"])
def test_what_does_not_fit_is_refused(way: str) -> None:
    with pytest.raises(DoesNotFitError, match="do not fit"):
        rounded(torch.tensor([1.0, 1e5]), FP16, "a", way)  # type: ignore[arg-type]
    for bad in (math.nan, math.inf):
        for dtype in (FP16, BF16, torch.float32):
            with pytest.raises(VerificationError, match="NaN or infinity"):
                rounded(torch.tensor([1.0, bad]), dtype, "a", way)  # type: ignore[arg-type]
    assert rounded(torch.tensor([3], dtype=torch.int64), torch.int64, "a", way).tolist() == [3]  # type: ignore[arg-type]
