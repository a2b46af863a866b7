"""Examples as padded tensors, and the cut of a batch into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finetune.data.render import Example


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded on the right to the longest of them."""

    ids: torch.Tensor  # (b, t) int64
    attention: torch.Tensor  # (b, t) int64, 1 = a token, 0 = padding; by position, since the pad id may be the end-of-turn id (pitfall A3)
    supervised: torch.Tensor  # (b, t) bool, True where the token carries loss

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in (self.ids, self.attention, self.supervised)))


def collate(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """Pad ``examples`` to one tensor. ``pad_id`` is only a filler: padding is masked by position."""
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        attention[row, :length] = 1
        supervised[row, :length] = torch.tensor(example.mask)
    return Batch(ids, attention, supervised)


def cut(lengths: Sequence[int], max_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Indices of ``lengths`` cut into micro-batches of at most ``max_tokens`` tokens each, longest first.

    Padding counts, unless they are ``packed``. Neighbours in length share a micro-batch, so little is padded. An example longer than the
    budget stands alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    pieces: list[list[int]] = []
    tokens = 0
    for index in order:
        # The first of a piece is its longest, so it sets the padded width of all.
        wanted = tokens + lengths[index] if packed else (lengths[pieces[-1][0]] * (len(pieces[-1]) + 1) if pieces else 0)
        if pieces and wanted <= max_tokens:
            pieces[-1].append(index)
            tokens += lengths[index]
        else:
            pieces.append([index])
            tokens = lengths[index]
    return pieces
