"""Padding and micro-batches."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches import collate, cut
from finetune.data.render import Example


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_a_cut_loses_and_doubles_nothing_and_keeps_the_budget(lengths: list[int], budget: int) -> None:
    pieces = cut(lengths, budget)
    assert sorted(index for piece in pieces for index in piece) == list(range(len(lengths)))
    for piece in pieces:
        padded = len(piece) * max(lengths[index] for index in piece)
        assert padded <= budget or len(piece) == 1


def test_a3_padding_is_masked_by_position_not_by_id() -> None:
    end = 2
    batch = collate([Example((5, 6, end), (False, True, True), "a"), Example((7,), (False,), "b")], pad_id=end)
    assert batch.ids.tolist() == [[5, 6, end], [7, end, end]]
    assert batch.attention.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert torch.equal(batch.supervised, torch.tensor([[False, True, True], [False, False, False]]))
