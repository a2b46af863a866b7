"""Updates that are combined (M9 of the methods), against references written from the formulas and against PEFT's functions."""

from __future__ import annotations

import math

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from finetune.merging.algebra import average, dare, dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties


def low_rank(seed: int, shape: tuple[int, int] = (12, 10)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)


DELTAS = [low_rank(seed) for seed in range(3)]


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Element by element, from the definition."""
    order = sorted(range(delta.numel()), key=lambda place: -abs(float(delta.flatten()[place])))
    kept = set(order[: math.floor(density * delta.numel() + 1e-9)])
    return torch.tensor([float(value) if place in kept else 0.0 for place, value in enumerate(delta.flatten())]).reshape(delta.shape)


def agreed(deltas: list[Tensor]) -> Tensor:
    """Sign election and disjoint mean, element by element."""
    out = torch.zeros(deltas[0].shape)
    for place in range(out.numel()):
        values = [float(delta.flatten()[place]) for delta in deltas]
        sign = math.copysign(1.0, sum(values)) if sum(values) else 0.0
        same = [value for value in values if sign and value * sign > 0]
        out.view(-1)[place] = sum(same) / len(same) if same else 0.0
    return out


def test_m9_ties_of_one_update_at_density_one_is_the_update() -> None:
    assert torch.equal(ties([DELTAS[0]], density=1.0), DELTAS[0])
    assert torch.equal(average([DELTAS[0]]), DELTAS[0])


def test_m9_the_mean_of_dare_is_the_update() -> None:
    delta, drop, draws = DELTAS[0].double(), 0.7, 3000
    generator = torch.Generator().manual_seed(0)
    mean = sum(dare(delta, drop, generator).double() for _ in range(draws)) / draws
    sigma = delta.abs() * math.sqrt(drop / (1 - drop) / draws)
    z = (mean - delta) / sigma
    print(f"DARE: sum z = {float(z.sum() / math.sqrt(z.numel())):.2f}, largest |z| = {float(z.abs().max()):.2f} of {z.numel()}")
    assert abs(float(z.sum())) / math.sqrt(z.numel()) < 3
    assert float((z.abs() > 3).double().mean()) < 0.02
    assert 0.8 < float(z.std()) < 1.2  # neither biased nor less random than it should be


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -1.0, 2.0], [-1.0, -0.25, 0.0]])
def test_task_arithmetic_is_the_weighted_sum(weights: list[float]) -> None:
    expected = sum(weight * delta for weight, delta in zip(weights, DELTAS, strict=True))
    torch.testing.assert_close(task_arithmetic(DELTAS, weights), expected)


def test_task_arithmetic_takes_an_update_away() -> None:
    assert not task_arithmetic([DELTAS[0], DELTAS[0]], [1.0, -1.0]).any()
    torch.testing.assert_close(average(DELTAS), (DELTAS[0] + DELTAS[1] + DELTAS[2]) / 3)


@pytest.mark.parametrize("density", [0.1, 0.29, 0.5, 1.0])
def test_trimming_and_ties_are_what_the_paper_says(density: float) -> None:
    assert torch.equal(magnitude_prune(DELTAS[0], density), trimmed(DELTAS[0], density))
    torch.testing.assert_close(ties(DELTAS, density, scale=1.5), 1.5 * agreed([trimmed(delta, density) for delta in DELTAS]))


def test_a_share_is_not_rounded_down_by_floating_point() -> None:
    assert int(0.29 * 100) == 28  # which PEFT keeps
    assert int((magnitude_prune(low_rank(0, (10, 10)), 0.29) != 0).sum()) == 29


def test_opposite_updates_cancel_in_ties() -> None:
    assert not ties([DELTAS[0], -DELTAS[0]], density=1.0).any()


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_agrees_with_peft_where_peft_follows_the_papers(density: float) -> None:
    ones = torch.ones(3)
    assert torch.equal(magnitude_prune(DELTAS[1], density), merge_utils.prune(DELTAS[1], density, "magnitude"))
    torch.testing.assert_close(ties(DELTAS, density), merge_utils.ties(DELTAS, ones, density))
    weights = [0.5, -1.0, 2.0]
    pruned = [magnitude_prune(delta, density) for delta in DELTAS]
    torch.testing.assert_close(task_arithmetic(pruned, weights), merge_utils.magnitude_prune(DELTAS, torch.tensor(weights), density))


def test_dare_of_several_updates() -> None:
    drop, weights = 0.6, [1.0, -0.5, 2.0]
    generator = torch.Generator().manual_seed(7)
    kept = [delta * (torch.rand(delta.shape, generator=generator) >= drop) / (1 - drop) for delta in DELTAS]
    expected = sum(weight * delta for weight, delta in zip(weights, kept, strict=True))
    torch.testing.assert_close(dare_linear(DELTAS, weights, drop, seed=7), expected)
    torch.testing.assert_close(dare_ties(DELTAS, drop, seed=7, scale=0.5), 0.5 * agreed(kept))
    assert not torch.equal(dare_linear(DELTAS, weights, drop, seed=8), dare_linear(DELTAS, weights, drop, seed=7))


def test_dare_that_drops_nothing_is_the_rest_of_the_method() -> None:
    torch.testing.assert_close(dare_linear(DELTAS, [1.0, 2.0, -1.0], 0.0, seed=0), task_arithmetic(DELTAS, [1.0, 2.0, -1.0]))
    torch.testing.assert_close(dare_ties(DELTAS, 0.0, seed=0), ties(DELTAS, density=1.0))


def test_dare_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dare_ties(DELTAS, 0.5, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_is_summed_in_fp32() -> None:
    parts = [delta.bfloat16() for delta in DELTAS]
    found = average(parts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sum(part.float() for part in parts) / 3)


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to combine"):
        average([])
    with pytest.raises(ValueError, match="one shape"):
        ties([DELTAS[0], DELTAS[1].T])
    with pytest.raises(ValueError, match="as many finite weights"):
        task_arithmetic(DELTAS, [1.0])
    for density in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="density lies in"):
            magnitude_prune(DELTAS[0], density)
    for drop in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="is dropped"):
            dare(DELTAS[0], drop, torch.Generator())
