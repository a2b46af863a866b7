"""How much of the computation padding will take, from the lengths alone."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.config.schema import Config
from finetune.training.batching import global_batch, micro_batches

_STEPS = 64


def padding_share(lengths: Sequence[int], config: Config, tokens_per_device: int) -> float:
    """Share of padding among all positions that are computed, over the first steps of the first epoch as the run would cut them."""
    computed = real = 0
    for step in range(min(_STEPS, -(-len(lengths) // config.train.batch_size))):
        batch = global_batch(len(lengths), config.train.batch_size, config.seed, step)
        for piece in micro_batches(batch, lengths, tokens_per_device):
            own = [lengths[index] for index in piece]
            computed += max(own) * len(own)
            real += sum(own)
    return 1.0 - real / computed
