"""How many of torch's threads pass over the tensors that train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_LEAST_SHARED = 2**19
"""Elements of a tensor from which a second core saves anything. Cores meet once a tensor, which takes 40 us: AdamW over the 420 of a LoRA
r=16 of SmolLM2, 11,630 elements on average, takes 24 ms with two cores and 4 with one (13.2 and 12.7 at 2**19, 37 and 40 at 2**22)."""


@contextmanager
def suited_threads(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, passes over ``tensors`` take one core where these lie on a CPU and are small; as many as before, else and afterwards."""
    if not tensors or tensors[0].device.type != "cpu" or sum(each.numel() for each in tensors) >= _LEAST_SHARED * len(tensors):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
