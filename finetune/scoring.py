"""Losses of examples under a model: the one place where validation, evaluation and merge checks get their numbers from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from finetune.data.batches import collate, cut
from finetune.data.examples import Examples
from finetune.data.render import Example
from finetune.model.head import causal_model, target_losses
from finetune.model.packing import is_packed
from finetune.model.virtual import virtual_tokens


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model and how to run it."""

    model: Any
    device: torch.device
    precision: str
    """``bf16`` runs matrix products in bf16 under autocast; ``fp32`` does not."""
    max_tokens: int = 2048
    """Tokens of a micro-batch, padding included: memory and speed, never the result."""

    @property
    def packed(self) -> bool:
        """Whether micro-batches are run without padding."""
        return is_packed(causal_model(self.model)) and not virtual_tokens(self.model)

    def autocast(self) -> AbstractContextManager[object]:
        """The context that forward passes run in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    @torch.no_grad()
    def losses(self, examples: Sequence[Example], advance: Callable[[int], None] = lambda _: None) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of the example, (n,) float64 nats of its supervised tokens), in no particular order; the model is put into eval mode.

        ``advance`` is told how many examples were done.
        """
        self.model.eval()
        lengths = examples.lengths.tolist() if isinstance(examples, Examples) else [len(example.ids) for example in examples]
        for piece in cut(lengths, self.max_tokens, packed=self.packed):
            chosen = [examples[index] for index in piece]
            batch = collate(chosen)
            with self.autocast():
                losses = target_losses(self.model, batch.ids, batch.attention, batch.supervised)
            counts = [sum(example.mask[1:]) for example in chosen]
            yield from zip(piece, torch.split(losses.double().cpu(), counts), strict=True)
            advance(len(piece))

    def mean_loss(self, examples: Sequence[Example], advance: Callable[[int], None] = lambda _: None) -> float:
        """Mean nats a supervised token over all of ``examples``: every token counts the same, however they are batched (pitfall A16)."""
        total, count = self.total_loss(examples, advance)
        return total / count

    def total_loss(self, examples: Sequence[Example], advance: Callable[[int], None] = lambda _: None) -> tuple[float, int]:
        """Nats summed over the supervised tokens of ``examples``, and their number."""
        total, count = 0.0, 0
        for _, losses in self.losses(examples, advance):
            total += float(losses.sum())
            count += len(losses)
        return total, count
