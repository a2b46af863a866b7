"""Which examples make each optimizer step, and which device computes which of them.

The global batch is fixed by (seed, epoch, step) alone. How it is cut into micro-batches and shared over devices changes speed and
memory, never the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from finetune.data.batches import cut
from finetune.data.examples import Ints, Rows


def global_batch(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of optimizer step ``step`` (0-based, counted over the whole run); the last of an epoch may be fewer."""
    per_epoch = -(-rows // batch_size)
    epoch, within = divmod(step, per_epoch)
    return [int(index) for index in _order(rows, seed, epoch)[within * batch_size : (within + 1) * batch_size]]


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> Rows:
    """Kept for the epoch: to draw it anew at each step would cost 0.1 s for ten million rows."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(rows)


def micro_batches(indices: Sequence[int], lengths: Sequence[int] | Ints, max_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """``indices`` cut by length into micro-batches of at most ``max_tokens`` tokens, as `cut` counts them; ``lengths``: of all examples."""
    chosen = [int(lengths[index]) for index in indices]
    return [[indices[position] for position in piece] for piece in cut(chosen, max_tokens, packed=packed)]


def share(pieces: Sequence[list[int]], rank: int, world: int) -> list[tuple[int, list[int]]]:
    """The micro-batches of device ``rank``, each with its number in the whole step (which seeds its dropout)."""
    return [(number, piece) for number, piece in enumerate(pieces) if number % world == rank]


def dropout_seed(seed: int, step: int, piece: int) -> int:
    """Seed of one micro-batch's dropout: a resumed run draws the same without any generator state having been saved."""
    return int(np.random.SeedSequence([seed, step, piece]).generate_state(1, np.uint64)[0] >> 1)
