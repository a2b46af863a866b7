"""phi of known subspaces. Part of check M7 of the methods."""

from __future__ import annotations

import pytest
import torch

from finetune.analysis.similarity import compare, phi, sizes_up_to


def basis(d: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def test_m7_phi_of_a_subspace_with_itself_is_one_and_of_orthogonal_ones_zero() -> None:
    both = basis(32, 8)
    first, second = both[:, :4], both[:, 4:]
    for i in range(1, 5):
        assert phi(first, first, i, i) == pytest.approx(1.0)
        assert phi(first, second, i, i) == pytest.approx(0.0, abs=1e-12)


def test_phi_depends_on_the_space_and_not_on_its_basis() -> None:
    space, other = basis(32, 4), basis(32, 4, seed=1)
    assert phi(space @ basis(4, 4, seed=2), other, 4, 4) == pytest.approx(phi(space, other, 4, 4))


def test_phi_of_half_shared_spaces_and_of_one_inside_the_other() -> None:
    axes = torch.eye(8, dtype=torch.float64)
    assert phi(axes[:, :4], axes[:, 2:6], 4, 4) == pytest.approx(0.5)
    assert phi(axes[:, :2], axes[:, :4], 2, 4) == pytest.approx(1.0)  # min(i, j) = 2


def test_phi_is_the_formula_on_random_spaces_and_chance_is_its_mean() -> None:
    found = [phi(basis(64, 4, seed=2 * n), basis(64, 8, seed=2 * n + 1), 4, 8) for n in range(200)]
    one = torch.linalg.matrix_norm(basis(64, 4, seed=0).T @ basis(64, 8, seed=1)) ** 2 / 4
    assert found[0] == pytest.approx(float(one))
    assert sum(found) / len(found) == pytest.approx(8 / 64, rel=0.05)


def test_the_grid_holds_powers_of_four_and_the_rank() -> None:
    assert [sizes_up_to(n) for n in (1, 4, 8, 16, 20)] == [(1,), (1, 4), (1, 4, 8), (1, 4, 16), (1, 4, 16, 20)]


def test_a_comparison_is_indexed_first_run_down_second_across() -> None:
    first, second = basis(32, 8, seed=1), basis(32, 5, seed=2)
    found = compare("model.layers.3.mlp.up_proj", "update", first, second)
    assert found is not None
    assert (found.kind, found.layer, found.sizes, found.dimension) == ("up_proj", 3, (1, 4, 5), 32)
    assert found.phi[0][2] == pytest.approx(phi(first, second, 1, 5))
    assert found.at(4) == found.phi[1][1]
    assert found.chance(4) == 4 / 32


def test_an_update_of_zeros_cannot_be_compared() -> None:
    assert compare("q", "update", basis(8, 2), torch.zeros(8, 0, dtype=torch.float64)) is None
