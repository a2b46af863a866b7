"""Cross-entropy whose gradient is taken while the logits exist: equal to torch's own, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from finetune.model.frozen_head import ROWS, _chunk, fits, frozen_head_losses


@pytest.mark.parametrize("size", [1.0, 1e4], ids=["usual", "logits in the ten thousands"])
@pytest.mark.parametrize("rows", [1, 31, 256, 257, 600])
def test_losses_and_gradients_are_those_of_torch(rows: int, size: float):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 97, bias=False).requires_grad_(False)
    head.weight *= size
    hidden, targets, upstream = torch.randn(rows, 16), torch.randint(0, 97, (rows,)), torch.randn(rows)
    found, expected = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    losses = frozen_head_losses(found, head, targets)
    reference = functional.cross_entropy(head(expected), targets, reduction="none")
    torch.testing.assert_close(losses, reference, rtol=1e-6, atol=1e-6)
    losses.backward(upstream)
    reference.backward(upstream)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6 * size)


def test_bf16_is_as_near_to_fp32_as_torchs():
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 997, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(200, 64), torch.randint(0, 997, (200,))
    gradients = []
    for own, enabled in ((False, False), (False, True), (True, True)):
        rows = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if own:
                losses = frozen_head_losses(rows, head, targets)
            else:
                losses = functional.cross_entropy(head(rows).float(), targets, reduction="none")
        losses.mean().backward()
        gradients.append(rows.grad)
    exact, torchs, ours = gradients
    assert float((ours - exact).norm()) <= 1.1 * float((torchs - exact).norm())


@pytest.mark.parametrize("rows", [1, 32, 33, 255, 256, 257, 290, 512, 513])
def test_chunks_are_about_as_large_and_of_few_sizes(rows: int):
    size = _chunk(rows)
    assert size <= ROWS
    assert size % 32 == 0
    last = rows % size or size
    assert rows <= 32 or last >= size // 2 - 32


def test_heads_that_train_or_have_more_to_do_are_left_to_torch():
    head = torch.nn.Linear(4, 5, bias=False)
    assert not fits(head)
    assert fits(head.requires_grad_(False))
    assert not fits(torch.nn.Linear(4, 5).requires_grad_(False))
    assert not fits(torch.nn.Sequential(head))
