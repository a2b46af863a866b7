"""The loss over a data set does not depend on how it is batched, cut or ordered, and a neighbour in a batch changes no row's losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from finetune.data.batches import collate
from finetune.data.examples import Examples
from finetune.data.render import Example
from finetune.model.head import target_losses
from finetune.scoring import Scorer

VOCABULARY = 320


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval().requires_grad_(False)


def made(shape: Sequence[tuple[int, int]], seed: int = 0) -> list[Example]:
    """An example of random tokens for each (tokens without loss, tokens with loss)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, (plain, taught) in enumerate(shape):
        ids = torch.randint(0, VOCABULARY, (plain + taught,), generator=generator).tolist()
        found.append(Example(tuple(ids), (False,) * plain + (True,) * taught, f"row {number}"))
    return found


SHAPES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=10)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(8, 200), st.randoms(use_true_random=False), st.booleans())
def test_a16_the_loss_depends_on_no_batch_and_no_order(
    model: Any, shape: list[tuple[int, int]], budget: int, random: Any, on_disk: bool
) -> None:
    examples = made(shape)
    alone = [target_losses(model, *_tensors([example])).double() for example in examples]
    expected = float(torch.cat(alone).sum()) / sum(len(losses) for losses in alone)
    shuffled = random.sample(examples, len(examples))
    rows = Examples.of(shuffled) if on_disk else shuffled
    assert Scorer(model, torch.device("cpu"), "fp32", budget).mean_loss(rows) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(1, 12), st.integers(1, 3))
def test_a14_a_neighbour_changes_no_loss(model: Any, shape: list[tuple[int, int]], length: int, seed: int) -> None:
    """Examples are never packed into one row: each stands alone in its row, whatever stands in the others."""
    first, *others = made(shape)
    swapped = made([(1, length)] * (len(shape) - 1), seed)
    before = target_losses(model, *_tensors([first, *others]))[: first.supervised]
    after = target_losses(model, *_tensors([first, *swapped]))[: first.supervised]
    assert torch.allclose(before, after, rtol=0, atol=1e-5)


def _tensors(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = collate(examples, pad_id=int(examples[0].ids[0]))  # a pad id that is a token of the text: only positions tell padding
    return batch.ids, batch.attention, batch.supervised
