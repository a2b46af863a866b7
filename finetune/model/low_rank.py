"""The best approximation of a matrix by one of small rank: exact, or by seeded subspace iteration where that pays."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_RANDOMIZED_SHARE = 8
"""The randomized SVD serves where (rank + oversampling) is at most this fraction of the smaller side; see `truncated_svd`."""
_SEED = 0
"""Fixed: the approximation is a function of the matrix alone, so that runs with different seeds share what was computed once."""


def truncated_svd(matrix: Tensor, rank: int, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), sigma (k,), V^T (k, d_in) of ``matrix`` (d_out, d_in) fp32 with k = min(rank, d_out, d_in), largest first.

    Where the rank is small against the matrix the range is found by seeded subspace iteration (Halko et al., 0909.4061, algorithm 4.4)
    instead of a full SVD; measured on NF4 residuals it leaves at most 0.6 % more error than the exact one. ``exact`` forces the full SVD.
    """
    kept = min(rank, *matrix.shape)
    if not exact and (rank + _OVERSAMPLING) * _RANDOMIZED_SHARE <= min(matrix.shape):
        basis = _range(matrix, rank + _OVERSAMPLING)
        u, sigma, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    else:
        u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :kept], sigma[:kept], v[:kept]


def low_rank(matrix: Tensor, rank: int, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Factors B (d_out, rank), A (rank, d_in) of the best rank-``rank`` approximation of ``matrix`` (d_out, d_in) fp32.

    Each carries the square root of the singular values. A rank above min(d_out, d_in) is filled up with zeros, so that the factors have
    the shapes that the adapter's configuration promises.
    """
    u, sigma, v = truncated_svd(matrix, rank, exact=exact)
    root = sigma.sqrt()
    return padded(u * root, root[:, None] * v, rank)


def padded(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``b`` (d_out, k) and ``a`` (k, d_in) with zeros up to ``rank``."""
    missing = rank - a.shape[0]
    return torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1), torch.cat([a, a.new_zeros(missing, a.shape[1])])


def _range(matrix: Tensor, columns: int) -> Tensor:
    """Orthonormal basis (d_out, columns) of the dominant range of ``matrix``, drawn on the CPU so that every device gets the same."""
    draw = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(_SEED))
    basis: Tensor = torch.linalg.qr(matrix @ draw.to(matrix))[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    return basis
