"""Updates that are combined (M9 of the methods), against references written from the papers' formulas and against PEFT's functions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from finetune.merging.algebra import above, dare, draw_of, magnitude_prune, task_arithmetic, threshold_of, ties

ONES = [1.0, 1.0, 1.0]


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


def pruned(density: float) -> list[Tensor]:
    return [magnitude_prune(delta, density) for delta in DELTAS]


def test_m9_ties_of_one_update_at_density_one_is_the_update() -> None:
    assert torch.equal(ties([magnitude_prune(DELTAS[0], 1.0)], [1.0]), DELTAS[0])
    assert torch.equal(task_arithmetic([DELTAS[0]], [1.0]), DELTAS[0])


def test_m9_the_mean_of_dare_is_the_update() -> None:
    delta, density, draws = DELTAS[0].double(), 0.3, 3000
    generator = torch.Generator().manual_seed(0)
    mean = sum(dare(delta, density, generator).double() for _ in range(draws)) / draws
    sigma = delta.abs() * math.sqrt((1 - density) / density / draws)
    z = (mean - delta) / sigma
    print(f"DARE: sum z = {float(z.sum() / math.sqrt(z.numel())):.2f}, largest |z| = {float(z.abs().max()):.2f} of {z.numel()}")
    assert abs(float(z.sum())) / math.sqrt(z.numel()) < 3
    assert float((z.abs() > 3).double().mean()) < 0.02
    assert 0.8 < float(z.std()) < 1.2  # neither biased nor less random than it should be


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -1.0, 2.0], [-1.0, -0.25, 0.0]])
def test_task_arithmetic_is_the_weighted_sum(weights: list[float]) -> None:
    expected = sum(weight * delta for weight, delta in zip(weights, DELTAS, strict=True))
    torch.testing.assert_close(task_arithmetic(DELTAS, weights), expected)
    torch.testing.assert_close(task_arithmetic(DELTAS, weights), merge_utils.task_arithmetic(DELTAS, torch.tensor(weights)))


def test_task_arithmetic_takes_an_update_away() -> None:
    assert not task_arithmetic([DELTAS[0], DELTAS[0]], [1.0, -1.0]).any()
    torch.testing.assert_close(task_arithmetic(DELTAS, [1 / 3] * 3), (DELTAS[0] + DELTAS[1] + DELTAS[2]) / 3)


@pytest.mark.parametrize("density", [0.1, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("weights", [ONES, [0.5, -1.0, 2.0]])
def test_trimming_and_ties_are_what_the_paper_says(density: float, weights: list[float]) -> None:
    """A weight makes another update of an update, before signs are elected: a negative one counts for the other side."""
    assert torch.equal(magnitude_prune(DELTAS[0], density), trimmed(DELTAS[0], density))
    expected = 1.5 * agreed([weight * trimmed(delta, density) for weight, delta in zip(weights, DELTAS, strict=True)])
    torch.testing.assert_close(ties(pruned(density), weights, scale=1.5), expected)


@pytest.mark.parametrize("density", [1e-9, 0.001, 0.05, 0.2, 0.5, 0.77, 1.0])
def test_the_threshold_of_a_whole_update_is_its_kth_largest_magnitude(density: float) -> None:
    tensors = [low_rank(seed, shape) * scale for seed, (shape, scale) in enumerate([((7, 30), 1.0), ((64, 9), 1e-3), ((1, 5), 40.0)])]
    magnitudes = torch.cat([tensor.flatten() for tensor in tensors]).abs().sort(descending=True).values
    kept = math.floor(density * len(magnitudes) + 1e-9)
    threshold = threshold_of(tensors, density)
    assert threshold == (float(magnitudes[kept - 1]) if kept else math.inf)
    assert sum(int((above(tensor, threshold) != 0).sum()) for tensor in tensors) == kept
    assert torch.equal(torch.cat([above(tensor, threshold).flatten() for tensor in tensors]), trimmed_together(tensors, density))


def trimmed_together(tensors: list[Tensor], density: float) -> Tensor:
    """The paper's trimming: over the whole task vector."""
    return trimmed(torch.cat([tensor.flatten() for tensor in tensors]), density)


def test_elements_that_are_equal_to_the_threshold_are_all_kept() -> None:
    """As in the authors' code: which of equal elements are dropped would be chance."""
    tensor = torch.tensor([[3.0, -1.0, 1.0], [1.0, 0.0, 0.5]])
    threshold = threshold_of([tensor], 0.4)
    assert threshold == 1.0
    assert above(tensor, threshold).tolist() == [[3.0, -1.0, 1.0], [1.0, 0.0, 0.0]]


def test_updates_of_zeros_have_a_threshold() -> None:
    assert threshold_of([torch.zeros(4, 4)], 0.5) == 0.0
    assert threshold_of([torch.tensor([2.0, -3.0] + [0.0] * 8)], 0.9) == 0.0


def test_a_share_is_not_rounded_down_by_floating_point() -> None:
    assert int(0.29 * 100) == 28  # which PEFT keeps
    assert int((magnitude_prune(low_rank(0, (10, 10)), 0.29) != 0).sum()) == 29
    assert int((above(low_rank(0, (10, 10)), threshold_of([low_rank(0, (10, 10))], 0.29)) != 0).sum()) == 29


def test_opposite_updates_cancel_in_ties() -> None:
    assert not ties([DELTAS[0], -DELTAS[0]], [1.0, 1.0]).any()
    assert not ties([DELTAS[0], DELTAS[0]], [1.0, -1.0]).any()


def test_an_update_of_zeros_changes_neither_election_nor_mean() -> None:
    assert torch.equal(ties([*DELTAS, torch.zeros(12, 10)], [*ONES, 1.0]), ties(DELTAS, ONES))


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_agrees_with_peft_where_peft_follows_the_papers(density: float) -> None:
    assert torch.equal(magnitude_prune(DELTAS[1], density), merge_utils.prune(DELTAS[1], density, "magnitude"))
    torch.testing.assert_close(ties(pruned(density), ONES), merge_utils.ties(DELTAS, torch.ones(3), density))
    torch.testing.assert_close(ties(pruned(density), [0.7] * 3), merge_utils.ties(DELTAS, torch.full((3,), 0.7), density))
    weights = [0.5, -1.0, 2.0]
    expected = merge_utils.magnitude_prune(DELTAS, torch.tensor(weights), density)
    torch.testing.assert_close(task_arithmetic(pruned(density), weights), expected)


@pytest.mark.parametrize("weights", [ONES, [1.0, -0.5, 2.0]])
def test_dare_agrees_with_peft_given_the_same_masks(weights: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws from the global generator; here it is handed the masks that were drawn."""
    density = 0.4
    kept = [dare(delta, density, draw_of(7, place, "w")) for place, delta in enumerate(DELTAS)]
    masks = [(delta != 0).float() for delta in kept]
    monkeypatch.setattr(torch, "bernoulli", lambda _: masks.pop(0))
    torch.testing.assert_close(task_arithmetic(kept, weights), merge_utils.dare_linear(DELTAS, torch.tensor(weights), density))
    if weights == ONES:
        masks = [(delta != 0).float() for delta in kept]
        torch.testing.assert_close(ties(kept, weights), merge_utils.dare_ties(DELTAS, torch.tensor(weights), density))


def test_dare_drops_and_enlarges() -> None:
    delta = torch.ones(200, 200)
    kept = dare(delta, 0.25, draw_of(0, 0, "w"))
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert float((kept != 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(dare(DELTAS[0], 1.0, draw_of(0, 0, "w")), DELTAS[0])


def test_a_draw_depends_on_seed_place_and_name_alone() -> None:
    def mask(seed: int, place: int, name: str) -> Tensor:
        return dare(torch.ones(30, 30), 0.5, draw_of(seed, place, name)) != 0

    first = mask(1, 2, "layers.0.q_proj.weight")
    mask(9, 9, "another")
    assert torch.equal(mask(1, 2, "layers.0.q_proj.weight"), first)
    for other in ((2, 2, "layers.0.q_proj.weight"), (1, 3, "layers.0.q_proj.weight"), (1, 2, "layers.1.q_proj.weight")):
        assert float((mask(*other) == first).float().mean()) == pytest.approx(0.5, abs=0.1)


def test_dare_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dare(DELTAS[0], 0.5, draw_of(1, 0, "w"))
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_is_summed_in_fp32() -> None:
    parts = [delta.bfloat16() for delta in DELTAS]
    for found, expected in (
        (task_arithmetic(parts, ONES), sum(part.float() for part in parts)),
        (ties(parts, ONES), agreed([part.float() for part in parts])),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)


class Counted:
    """Updates that are made one at a time, and how many live at once."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return (delta.clone() for delta in DELTAS)


def test_updates_are_iterated_not_collected_and_stay_as_they_are() -> None:
    counted = Counted()
    torch.testing.assert_close(ties(counted, ONES), ties(DELTAS, ONES))
    assert counted.passes == 2
    before = [delta.clone() for delta in DELTAS]
    task_arithmetic(DELTAS, ONES)
    ties(DELTAS, ONES)
    threshold_of(DELTAS, 0.3)
    assert all(torch.equal(left, right) for left, right in zip(before, DELTAS, strict=True))


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to combine"):
        task_arithmetic([], [])
    with pytest.raises(ValueError, match="one shape"):
        ties([DELTAS[0], DELTAS[1].T], [1.0, 1.0])
    for weights in ([1.0], [1.0, math.nan, 1.0]):
        with pytest.raises(ValueError, match="finite"):
            task_arithmetic(DELTAS, weights)
    for density in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="density lies in"):
            magnitude_prune(DELTAS[0], density)
        with pytest.raises(ValueError, match="density lies in"):
            dare(DELTAS[0], density, torch.Generator())
