"""Threads of passes over what trains: one core for small tensors, all for large ones, and all again afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from finetune.training.threads import suited_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("tensors", "inside"), [([torch.empty(16, 576)] * 420, 1), ([torch.empty(2**10, 2**10)], 2), ([], 2)])
def test_small_tensors_take_one_core(tensors: list[torch.Tensor], inside: int) -> None:
    with suited_threads(tensors):
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 2


def test_tensors_elsewhere_are_left_alone() -> None:
    with suited_threads([torch.empty(4, device="meta")]):
        assert torch.get_num_threads() == 2


def test_all_threads_are_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="step"), suited_threads([torch.empty(4)]):
        raise ValueError("step")
    assert torch.get_num_threads() == 2
