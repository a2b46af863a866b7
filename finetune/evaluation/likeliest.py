"""Whether the right answer is the likeliest token by token: what greedy decoding would give, without generating."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from finetune.data.batches import collate, cut
from finetune.data.render import Example
from finetune.model.head import causal_model, chosen_logits
from finetune.model.virtual import forward_inputs
from finetune.scoring import Scorer

_TOKENS = 512
"""Of a batch at most: the logits of all its answers exist at once."""


@torch.no_grad()
def likeliest(scorer: Scorer, examples: Sequence[Example]) -> list[tuple[int, int]]:
    """For each example, how many of its supervised tokens are the likeliest after all before them, and how many it has.

    Greedy decoding gives the supervised text exactly where the two are equal.
    """
    scorer.model.eval()
    found = [(0, 0)] * len(examples)
    for piece in cut([len(example.ids) for example in examples], min(scorer.max_tokens, _TOKENS)):
        batch = collate([examples[index] for index in piece])
        ids, wanted = batch.ids.to(scorer.device), batch.supervised[:, 1:]
        with scorer.autocast():
            inputs, before = forward_inputs(scorer.model, ids, batch.attention.to(scorer.device))
            logits = chosen_logits(causal_model(scorer.model), inputs, functional.pad(wanted, (before, 1)))
        hits = logits.argmax(-1).cpu() == batch.ids[:, 1:][wanted]
        counts = wanted.sum(1).tolist()
        for index, part in zip(piece, torch.split(hits, counts), strict=True):
            found[index] = (int(part.sum()), len(part))
    return found
