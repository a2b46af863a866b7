"""Several updates of one weight become one: average, task arithmetic, TIES, DARE, magnitude pruning.

All functions are pure and work on dense updates delta_t = s_t B_t A_t of one weight, (d_out, d_in) or any other shape that all share, and
return one in fp32. Signs and sizes of single elements mean something in delta alone: in A or B they change with any rotation of the two.

``deltas`` is iterated once, for the methods that elect signs twice, and never held as a whole: an iterable that computes each update
anew keeps memory at a few tensors, however many updates there are. PEFT's functions (`peft.utils.merge_utils`) stack all updates three
times over, and three of them differ from the papers: they elect signs before they weigh, so that a negative weight counts for the wrong
side; they take an election that ends at zero for a vote for plus; and they draw DARE's masks from the global generator. Where they follow
the papers the tests compare with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256

import torch
from torch import Tensor

_AT_ONCE = 1 << 22
"""Elements that are sorted into bins at a time."""
_LOW_BITS = 16
"""A magnitude in fp32 has 31 bits, which order as the numbers do: they are counted by the upper 15, then by the lower 16."""


def task_arithmetic(deltas: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """delta = sum_t w_t delta_t (2212.04089, section 2). A negative weight takes away what an update learned; 1/T each is the average."""
    return _total(_weighed(deltas, weights))


def magnitude_prune(delta: Tensor, density: float) -> Tensor:
    """The share ``density`` (0 < density <= 1) of the elements of ``delta`` that are largest by magnitude; zero elsewhere.

    Trimming of TIES (2306.01708, section 4.1) weight by weight. floor(density n) of n elements are kept; of equal ones, those that come
    first.
    """
    flat = delta.float().flatten()
    kept = flat.abs().argsort(descending=True, stable=True)[: kept_of(flat.numel(), density)]
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(delta.shape)


def kept_of(count: int, density: float) -> int:
    """floor(density count): how many of ``count`` elements are kept."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density lies in (0, 1], not {density}")
    # 0.29 of 100 elements is 29, not the 28 that 28.999999999999996 would be cut to
    return math.floor(density * count + 1e-9)


def above(delta: Tensor, threshold: float) -> Tensor:
    """The elements of ``delta`` whose magnitude is at least ``threshold``; zero elsewhere."""
    values = delta.float()
    return values.where((values >= threshold) | (values <= -threshold), 0.0)


def threshold_of(deltas: Iterable[Tensor], density: float) -> float:
    """The magnitude that the share ``density`` of all elements of ``deltas`` together reach; infinity where not one element is kept.

    Trimming of TIES as the paper has it (2306.01708, algorithm 1): over the whole update of a model, not weight by weight. The k-th largest
    of n elements, k = floor(density n), exactly, in two passes over tensors of any shape and number, each in memory on its own.
    """
    upper = _counts(deltas, lambda bits: bits >> _LOW_BITS, 1 << 15)
    wanted = kept_of(int(upper.sum()), density)
    if not wanted:
        return math.inf
    high, left = _nth(upper, wanted)
    lower = _counts(deltas, lambda bits: (bits & ((1 << _LOW_BITS) - 1))[bits >> _LOW_BITS == high], 1 << _LOW_BITS)
    low, _ = _nth(lower, left)
    return float(torch.tensor((high << _LOW_BITS) | low, dtype=torch.int32).view(torch.float32))


def ties(deltas: Iterable[Tensor], weights: Sequence[float], scale: float = 1.0) -> Tensor:
    """TIES (2306.01708, section 4.1, algorithm 1) of updates that were trimmed: elect signs, average what agrees.

    With d_t = w_t times the trimmed update, for each element p

        gamma_p = sgn(sum_t d_tp),   A_p = {t : sgn(d_tp) = gamma_p},   delta_p = lambda / |A_p| sum_{t in A_p} d_tp

    and zero where no sign wins. ``scale`` is lambda. The paper has no weights: all are one. An update that is zero agrees with nobody, so
    that one which is missing changes neither election nor mean.
    """
    elected = _total(_weighed(deltas, weights)).sign_().to(torch.int8)
    summed = torch.zeros(elected.shape, device=elected.device)
    count = torch.zeros_like(summed, dtype=torch.int16)
    for delta in _weighed(deltas, weights):
        for part, sign, into, agreeing in _pieces(delta, elected, summed, count):
            agrees = (part.sign() == sign) & (sign != 0)
            into += part * agrees
            agreeing += agrees
    for into, agreeing in _pieces(summed, count):
        into.mul_(scale).div_(agreeing.clamp(min=1))
    return summed


def dare(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE (2311.03099, equation 2): each element is kept with probability ``density`` = 1 - p and divided by it, else dropped.

    Its expectation is ``delta``. ``generator`` is one of the CPU, so that every device drops the same elements.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density lies in (0, 1], not {density}")
    kept = torch.rand(delta.shape, generator=generator).to(delta.device) < density
    return (delta.float() * kept).div_(density)


def draw_of(seed: int, place: int, name: str) -> torch.Generator:
    """The generator of the mask for the weight ``name`` of the adapter at ``place`` of a list: of these and ``seed`` alone."""
    digest = sha256(f"{seed}/{place}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _weighed(deltas: Iterable[Tensor], weights: Sequence[float]) -> Iterator[Tensor]:
    """w_t delta_t in fp32, each a tensor of its own; ValueError unless there are as many finite weights, and one shape."""
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights are finite, not {list(weights)}")
    shape = None
    given = iter(deltas)
    for weight in weights:
        delta = next(given, None)
        if delta is None or (shape is not None and delta.shape != shape):
            raise ValueError("there is nothing to combine" if delta is None else f"updates of one weight have one shape, not {shape} too")
        shape = delta.shape
        yield delta.float() * weight
    if next(given, None) is not None:
        raise ValueError(f"updates need as many finite weights, not {list(weights)}")


def _total(deltas: Iterator[Tensor]) -> Tensor:
    total = next(deltas, None)
    if total is None:
        raise ValueError("there is nothing to combine")
    for delta in deltas:
        total += delta
    return total


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of each of ``tensors``, some at a time, so that what is computed of them is small; they are views."""
    return zip(*(torch.split(tensor.contiguous().view(-1), _AT_ONCE) for tensor in tensors), strict=True)


def _counts(deltas: Iterable[Tensor], bin_of: Callable[[Tensor], Tensor], bins: int) -> Tensor:
    """(bins,) int64: how many magnitudes of ``deltas`` fall into each bin."""
    counts = torch.zeros(bins, dtype=torch.int64)
    for delta in deltas:
        for (piece,) in _pieces(delta.float()):
            counts += torch.bincount(bin_of(piece.abs().view(torch.int32)).cpu(), minlength=bins)
    return counts


def _nth(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest element (from 1), and its rank within the bin."""
    reached = counts.flip(0).cumsum(0)
    place = int((reached < rank).sum())
    before = int(reached[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before
