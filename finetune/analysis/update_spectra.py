"""The singular values and directions of a low-rank update, from its factors: the (d_out, d_in) matrix is never formed.

With delta = L R^T, L = Q_L T_L, R = Q_R T_R (QR) and T_L T_R^T = u S v^T (a k x k SVD), delta = (Q_L u) S (Q_R v)^T. All in fp64: the
factors are thin, and a difference of two adapters cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-13
"""Of the factors' norms: what fp64 cannot tell from zero."""


@dataclass(frozen=True, slots=True)
class Directions:
    """The thin singular value decomposition of an update; k is its rank, 0 for an update of zeros."""

    u: Tensor
    """(d_out, k) fp64: left singular vectors, in the space of the module's outputs."""
    sigma: Tensor
    """(k,) fp64 above zero, falling."""
    v: Tensor
    """(d_in, k) fp64: right singular vectors, in the space of the module's inputs."""

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return float(self.sigma.norm())


def directions(left: Tensor, right: Tensor) -> Directions:
    """Singular values and vectors of ``left`` (d_out, k) times the transpose of ``right`` (d_in, k)."""
    q_left, t_left = torch.linalg.qr(left.double())
    q_right, t_right = torch.linalg.qr(right.double())
    u, sigma, vh = torch.linalg.svd(t_left @ t_right.T, full_matrices=False)
    # directions of rounding alone mean nothing, and the factors of a difference that vanished hold no others
    rank = int((sigma > _ROUNDING * float(t_left.norm()) * float(t_right.norm())).sum())
    return Directions(q_left @ u[:, :rank], sigma[:rank], q_right @ vh[:rank].T)


def effective_rank(sigma: Tensor) -> float:
    """exp(-sum p_i ln p_i) with p_i = sigma_i / sum(sigma) (Roy & Vetterli 2007, definition 1): k equal singular values give k.

    ``sigma`` (k,) are the singular values above zero; 0 where there are none.
    """
    if not len(sigma):
        return 0.0
    shares = sigma.double() / sigma.double().sum()
    return math.exp(-float((shares * shares.log()).sum()))


def amplification(norm: float, weight: Tensor, found: Directions, count: int) -> float | None:
    """||delta||_F / ||U^T W V||_F over the top ``count`` directions of delta (2106.09685, section 7.3).

    How much stronger the update is than what ``weight`` (d_out, d_in) already had in these directions. ``norm`` is ||delta||_F. None
    where the update or the weight has nothing there.
    """
    u, v = (side[:, :count].to(weight.device, torch.float32) for side in (found.u, found.v))
    there = float((u.T @ weight.float() @ v).norm())
    return norm / there if there and norm else None
