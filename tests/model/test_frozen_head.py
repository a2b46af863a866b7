"""Cross-entropy whose gradient is taken while the logits exist: equal to torch's own, in bounded memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from finetune.model.frozen_head import fits, frozen_head_losses

MEMORY = """
import resource, torch
from finetune.model.frozen_head import frozen_head_losses
torch.set_num_threads(1)
head = torch.nn.Linear(64, 128_256, bias=False).requires_grad_(False)
hidden = torch.randn(4096, 64, requires_grad=True)
targets = torch.randint(0, 128_256, (4096,))
frozen_head_losses(hidden[:8], head, targets[:8]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
frozen_head_losses(hidden, head, targets).mean().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("rows", [1, 127, 128, 300])
def test_losses_and_gradients_are_those_of_torch(rows: int):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 97, bias=False).requires_grad_(False)
    hidden, targets, upstream = torch.randn(rows, 16), torch.randint(0, 97, (rows,)), torch.randn(rows)
    found, expected = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    losses = frozen_head_losses(found, head, targets)
    reference = functional.cross_entropy(head(expected), targets, reduction="none")
    torch.testing.assert_close(losses, reference, rtol=1e-6, atol=1e-6)
    losses.backward(upstream)
    reference.backward(upstream)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)


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


def test_b5_memory_does_not_grow_with_vocabulary_times_length():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1000  # all logits at once would take 2,100 MB, twice


def test_heads_that_train_or_have_more_to_do_are_left_to_torch():
    head = torch.nn.Linear(4, 5, bias=False)
    assert not fits(head)
    assert fits(head.requires_grad_(False))
    assert not fits(torch.nn.Linear(4, 5).requires_grad_(False))
    assert not fits(torch.nn.Sequential(head))
