"""Attention over examples laid end to end against torch's own, example by example, in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from finetune.model.attention import KERNELS
from finetune.model.tiles import layout_of

SHORT = (3, 64, 1, 40, 7, 64, 2, 9, 63, 11, 5, 30, 8)
"""Thirteen examples of one tile: eight, four and one are attended together."""
LONG = (300, 65, 128, 257)
"""More than a tile; two of them are too long to keep their probabilities."""
MIXED = (70, *SHORT[:5], 300, 64, 129)
FILLING = 5


Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(heads, t, d), twice (groups, t, d), scale -> (heads, t, d)."""


def draw(heads: int, groups: int, total: int) -> list[Tensor]:
    """Q, K, V and the gradient of the output, in fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, total, 16), (groups, total, 16), (groups, total, 16), (total, heads, 16)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def packed(parts: list[Tensor], bounds: list[int], scale: float) -> list[Tensor]:
    """Output and gradients of ours, in the type of ``parts``."""
    inputs = [part.clone().requires_grad_() for part in parts[:3]]
    output = KERNELS["cpu"](inputs, torch.tensor(bounds, dtype=torch.int32), max(bounds), scale)
    output.backward(parts[3])
    return [output.detach(), *(each.grad for each in inputs if each.grad is not None)]


def fused(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True)[0]


def eager(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    key, value = (part.repeat_interleave(len(query) // len(key), 0) for part in (key, value))
    above = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).triu(1)
    return torch.softmax((scale * query @ key.transpose(1, 2)).masked_fill(above, float("-inf")), -1) @ value


def apart(parts: list[Tensor], bounds: list[int], scale: float, attention: Attention = fused) -> list[Tensor]:
    """The same by torch, each example alone; zero where none lies."""
    inputs = [part.clone().requires_grad_() for part in parts[:3]]
    output = torch.zeros_like(parts[3])
    for start, end in itertools.pairwise(bounds):
        query, key, value = (part[:, start:end] for part in inputs)
        output[start:end] = attention(query, key, value, scale).transpose(0, 1)
    output.backward(parts[3])
    return [output.detach(), *(each.grad for each in inputs if each.grad is not None)]


@pytest.mark.parametrize("lengths", [SHORT, LONG, MIXED, (1,), (64,), (65,)], ids=len)
@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (4, 4), (6, 1)])
def test_outputs_and_gradients_are_those_of_each_example_alone(lengths: tuple[int, ...], heads: int, groups: int) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    parts = draw(heads, groups, bounds[-1] + FILLING)
    for found, expected in zip(packed(parts, bounds, 0.3), apart(parts, bounds, 0.3), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_bf16_is_as_near_to_fp64_as_the_textbook_in_bf16() -> None:
    """Softmax of rounded scores, as the libraries' eager attention; torch's fused kernel keeps scores in fp32 and is nearer."""
    bounds = [0, *itertools.accumulate(MIXED)]
    half = [part.to(torch.bfloat16) for part in draw(9, 3, bounds[-1])]
    exact = apart([part.double() for part in half], bounds, 0.125)
    for ours, textbook, right in zip(packed(half, bounds, 0.125), apart(half, bounds, 0.125, eager), exact, strict=True):
        assert float((ours.double() - right).norm()) <= 1.1 * float((textbook.double() - right).norm())


def test_what_fills_a_tile_up_gets_no_gradient_and_is_not_seen() -> None:
    """Other values after the last example, and an infinite gradient there, change nothing."""
    bounds = [0, 3, 90]
    parts = draw(4, 2, bounds[-1] + FILLING)
    other = [part.clone() for part in parts]
    for part in other[:3]:
        part[:, bounds[-1] :] = 1e30
    other[3][bounds[-1] :] = float("inf")
    for one, two in zip(packed(parts, bounds, 0.25), packed(other, bounds, 0.25), strict=True):
        torch.testing.assert_close(one, two, rtol=0.0, atol=0.0)


def test_products_have_few_shapes_whatever_the_lengths() -> None:
    """oneDNN compiles a kernel for each: batches of 8, 4, 2 and 1 short examples, and a tile that sees a number of tiles."""
    shapes = set()
    for seed in range(20):
        lengths = torch.randint(1, 400, (30,), generator=torch.Generator().manual_seed(seed)).tolist()
        layout = layout_of((0, *itertools.accumulate(lengths)), 9, 3)
        total = sum(lengths)
        queries, keys = layout.asking(torch.empty(9, total, 4)), layout.seen(torch.empty(3, total, 4))
        asking = [piece.asking(queries) for piece in layout.pieces]
        assert sum(map(len, asking)) == len(queries)
        seen = [piece.seen(keys) for piece in layout.pieces]
        shapes |= {(tuple(one.shape), tuple(two.shape), two.stride()) for one, two in zip(asking, seen, strict=True)}
    assert len(shapes) <= 4 + 400 // 64 + 1
