"""How far two runs moved in the same directions: the subspace similarity of the LoRA paper (2106.09685, section 7.2).

    phi(i, j) = ||V_i^T V'_j||_F^2 / min(i, j)      0: orthogonal subspaces, 1: one lies within the other

V_i holds the first i right singular vectors, directions in the space of the module's inputs. It is taken of two matrices:

    A       as in the paper. Two runs with one seed start from the same random A, which alone makes this phi large
    update  of the whole update (s BA, or W' - W after full tuning): the start plays no part, since directions that B left at zero drop out

Two random subspaces of a space of d dimensions have phi(i, j) = max(i, j) / d in the mean: `chance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from finetune.planning.targets import kind_of, layer_of

Of = Literal["A", "update"]


@dataclass(frozen=True, slots=True)
class Similarity:
    """phi of one module in two runs."""

    module: str
    kind: str
    layer: int | None
    of: Of
    sizes: tuple[int, ...]
    """The i and j that were compared."""
    phi: tuple[tuple[float, ...], ...]
    """phi(i, j) with i down, j across; i counts in the first run, j in the second."""
    dimension: int
    """d, the number of inputs."""

    def at(self, size: int) -> float:
        """phi(size, size)."""
        place = self.sizes.index(size)
        return self.phi[place][place]

    def chance(self, size: int) -> float:
        """phi(size, size) of two random subspaces, in the mean."""
        return size / self.dimension


def phi(first: Tensor, second: Tensor, i: int, j: int) -> float:
    """phi(i, j) of two orthonormal bases (d, k) and (d, l), i <= k, j <= l."""
    return float((first[:, :i].T @ second[:, :j]).square().sum()) / min(i, j)


def sizes_up_to(largest: int) -> tuple[int, ...]:
    """1, 4, 16, 64, ... and ``largest``."""
    grid = [1]
    while grid[-1] * 4 < largest:
        grid.append(grid[-1] * 4)
    return tuple(sorted({*grid, largest}))


def compare(module: str, of: Of, first: Tensor, second: Tensor) -> Similarity | None:
    """phi over a grid of sizes for orthonormal bases (d, k), (d, l) in fp64; None where one of them is empty."""
    largest = min(first.shape[1], second.shape[1])
    if not largest:
        return None
    sizes = sizes_up_to(largest)
    grid = tuple(tuple(phi(first, second, i, j) for j in sizes) for i in sizes)
    return Similarity(module, kind_of(module), layer_of(module), of, sizes, grid, first.shape[0])
