"""Spectra of low-rank updates from thin factors, against dense references. Part of check M7 of the methods."""

from __future__ import annotations

import math

import pytest
import torch

from finetune.analysis.update_spectra import amplification, directions, effective_rank


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("d_out", "d_in", "k"), [(40, 24, 6), (24, 40, 6), (12, 40, 20), (40, 12, 20)])
def test_thin_factors_give_the_dense_svd(d_out: int, d_in: int, k: int) -> None:
    left, right = drawn(d_out, k, seed=1), drawn(d_in, k, seed=2)
    found = directions(left, right)
    dense = (left @ right.T).double()
    rank = min(k, d_out, d_in)
    torch.testing.assert_close(found.sigma, torch.linalg.svdvals(dense)[:rank], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.u * found.sigma @ found.v.T, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.u.T @ found.u, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(found.v.T @ found.v, torch.eye(rank, dtype=torch.float64))
    assert found.norm == pytest.approx(float(dense.norm()), rel=1e-6)


def test_a_difference_that_vanished_has_no_directions() -> None:
    b, a = drawn(20, 4, seed=1), drawn(4, 30, seed=2)
    found = directions(torch.cat([b, -b], dim=1), torch.cat([a.T, a.T], dim=1))
    assert len(found.sigma) == 0
    assert found.norm == 0.0
    assert effective_rank(found.sigma) == 0.0
    assert amplification(found.norm, drawn(20, 30), found, 4) is None


def test_a_small_difference_of_two_adapters_keeps_its_figures() -> None:
    """s(BA - B0 A0) where training moved B by a ten-thousandth: exact in fp64, gone in fp32."""
    b, a, moved = drawn(20, 4, seed=1), drawn(4, 30, seed=2), drawn(20, 4, seed=3) * 1e-4
    found = directions(torch.cat([(b + moved), -b], dim=1), torch.cat([a.T, a.T], dim=1))
    step = ((b + moved).double() - b.double()) @ a.double()
    torch.testing.assert_close(found.sigma, torch.linalg.svdvals(step)[:4], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        ([5.0], 1.0),
        ([2.0, 2.0, 2.0, 2.0], 4.0),
        ([3.0, 1.0], math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))),  # 1.7548
        ([1.0, 1e-12], 1.0),
    ],
)
def test_effective_rank_of_known_spectra(sigma: list[float], expected: float) -> None:
    assert effective_rank(torch.tensor(sigma, dtype=torch.float64)) == pytest.approx(expected, rel=1e-9)


def test_effective_rank_does_not_depend_on_scale() -> None:
    sigma = drawn(8).abs()
    assert effective_rank(sigma * 1e6) == pytest.approx(effective_rank(sigma), rel=1e-6)


def test_amplification_is_that_of_a_dense_svd() -> None:
    weight, left, right = drawn(40, 24, seed=3), drawn(40, 4, seed=1), drawn(24, 4, seed=2)
    u, sigma, vh = torch.linalg.svd(left @ right.T)
    reference = float(sigma.norm() / (u[:, :4].T @ weight @ vh[:4].T).norm())
    found = directions(left, right)
    assert amplification(found.norm, weight, found, 4) == pytest.approx(reference, rel=1e-5)


def test_amplification_of_a_multiple_of_the_weights_own_direction_is_that_multiple() -> None:
    u, sigma, vh = torch.linalg.svd(drawn(30, 20))
    found = directions(3.0 * sigma[0] * u[:, :1], vh[:1].T)
    assert amplification(found.norm, u[:, :20] * sigma @ vh, found, 1) == pytest.approx(3.0, rel=1e-5)
