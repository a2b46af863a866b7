"""Lanes: the step's examples each computed once, the gradient that of one lane, what cannot be shared left alone."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from finetune.config.schema import EightBit, Lora, NoQuantization
from finetune.data.batches import collate
from finetune.model.adapters import attach, trainable
from finetune.model.fast import accelerate
from finetune.model.head import target_losses
from finetune.model.load import load_base
from finetune.scoring import Scorer
from finetune.training.lanes import Work, can_share, run_lanes, split
from tests.training.test_batching_property import made

CPU, NONE = torch.device("cpu"), NoQuantization()
EXAMPLES = made([(9, 30), (4, 50), (20, 11), (3, 7), (40, 2), (5, 60), (1, 1), (30, 30)])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make_scorer(path: Path, **changed: Any) -> Scorer:
    torch.manual_seed(0)
    tuning = Lora(method="lora", rank=4, alpha=8, targets="all-linear", **changed)
    model = attach(load_base(path, NONE, torch.float32, CPU), tuning)
    for name, parameter in trainable(model).items():  # B starts at zero, which would leave A without a gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    accelerate(model, tuning)
    model.train()
    return Scorer(model, CPU, "fp32")


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.integers(1, 600), st.integers(1, 4))
def test_every_example_is_in_one_lane_and_no_more_tokens_are_computed_at_a_time(lengths: list[int], budget: int, threads: int) -> None:
    indices = list(range(len(lengths)))[::-1]
    lanes = split(indices, lengths, budget, threads)
    assert sorted(index for lane in lanes for piece in lane for index in piece) == sorted(indices)
    assert 1 <= len(lanes) <= threads
    assert all(lanes)
    at_once = sum(max(sum(lengths[index] for index in piece) for piece in lane) for lane in lanes)
    assert at_once <= max(budget, *lengths)


def test_lanes_are_of_even_length_where_there_is_work_for_them() -> None:
    lengths = [300, 100, 100, 100]
    assert sorted(sum(lengths[index] for piece in lane for index in piece) for lane in split([0, 1, 2, 3], lengths, 1024, 2)) == [300, 300]
    assert len(split([0, 1], [20, 20], 1024, 2)) == 1, "too little for two"


@given(st.lists(st.integers(128, 400), min_size=2, max_size=8))
def test_two_lanes_are_as_even_as_any_parting_of_the_examples(lengths: list[int]) -> None:
    lanes = split(range(len(lengths)), lengths, 10_000, 2)
    fullest = max(sum(lengths[index] for piece in lane for index in piece) for lane in lanes)
    ways = itertools.product((False, True), repeat=len(lengths))
    assert fullest == min(max(sum(itertools.compress(lengths, way)), sum(lengths) - sum(itertools.compress(lengths, way))) for way in ways)


def test_lanes_are_of_even_cost_and_cut_by_tokens() -> None:
    lanes = split([0, 1, 2, 3], [300, 100, 100, 100], 800, 2, [200, 600, 200, 200])
    assert sorted(sorted(index for piece in lane for index in piece) for lane in lanes) == [[0, 2, 3], [1]]
    assert all(sum([300, 100, 100, 100][index] for index in piece) <= 400 for lane in lanes for piece in lane)


def test_a_supervised_token_costs_what_the_head_multiplies_beside_what_the_blocks_do(tiny_model_dir: Path) -> None:
    model = load_base(tiny_model_dir, NONE, torch.float32, CPU)
    ids = torch.arange(8)[None]
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids)
    products = {name: sum(counts.values()) for name, counts in counted.get_flop_counts().items()}
    head = products["LlamaForCausalLM.lm_head"]
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = sum(products[f"LlamaForCausalLM.{name}"] for name in linears if name != "lm_head")
    work = Work.of(model)
    assert work.supervised == pytest.approx(head / blocks, rel=0.01)  # norms are counted with the blocks' weights
    assert work.tokens(64, 32) == round(64 + 32 * work.supervised + work.pair)
    assert work.tokens(65, 0) == round(65 + 3 * work.pair)


def test_the_fullest_of_several_lanes_gives_to_the_emptiest() -> None:
    lengths = [90, 80, 70, 60, 50, 50]  # by length alone: 90+50, 80+50, 70+60; nothing is above 140
    lanes = split(range(6), lengths, 10_000, 3)
    assert sorted(sum(lengths[index] for piece in lane for index in piece) for lane in lanes) == [130, 130, 140]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("budget", [1024, 200])  # one micro-batch a lane, and several
def test_the_gradient_is_that_of_one_lane_and_the_same_each_time(tiny_model_dir: Path, budget: int) -> None:
    scorer = make_scorer(tiny_model_dir)
    parameters = list(trainable(scorer.model).values())

    def loss_of(piece: list[int]) -> torch.Tensor:
        batch = collate([EXAMPLES[index] for index in piece])
        return target_losses(scorer.model, batch.ids, batch.attention, batch.supervised).sum()

    loss = loss_of(list(range(len(EXAMPLES))))
    expected = torch.autograd.grad(loss, parameters)
    lanes = split(range(len(EXAMPLES)), [len(example.ids) for example in EXAMPLES], budget, 2)
    assert len(lanes) == 2
    seen = []
    for _ in range(5):
        assert float(run_lanes(lanes, loss_of, parameters).detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
        seen.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
    for found, wanted in zip(seen[0], expected, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert all(torch.equal(one, other) for again in seen[1:] for one, other in zip(seen[0], again, strict=True))
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_one_tensor_given_to_two_parameters_becomes_two_gradients() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
    run_lanes([[[1]], [[2]]], lambda piece: (parameters[0] + parameters[1]).sum() * piece[0], parameters)
    parameters[0].grad.mul_(2)  # type: ignore[union-attr]  # as clipping does
    assert [None if each.grad is None else each.grad.tolist() for each in parameters] == [[6.0] * 3, [3.0] * 3, None]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("lanes", [[[[1]], [[2]]], [[[1], [2]]], [[[3]]]])
def test_a_gradient_lies_as_its_parameter_does(lanes: list[list[list[int]]]) -> None:
    """Fused optimizers read both from end to end."""
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    turned = torch.arange(6.0).view(3, 2)
    run_lanes(lanes, lambda piece: (parameter.T * turned).sum() * piece[0], [parameter])
    assert parameter.grad is not None
    assert parameter.grad.stride() == parameter.stride()
    assert parameter.grad.tolist() == (3 * turned.T).tolist()


def test_what_autograd_gave_is_gone_before_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that stay among what a pass kept break up its room."""
    gave: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    real = torch.autograd.grad

    def grad(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        gave.extend(weakref.ref(gradient) for gradient in found)
        return found

    def loss_of(piece: list[int]) -> torch.Tensor:
        alive.append(sum(gradient() is not None for gradient in gave))
        return sum((parameter.square().sum() * piece[0] for parameter in parameters), torch.zeros(()))

    monkeypatch.setattr(torch.autograd, "grad", grad)
    parameters = [torch.nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0)]
    run_lanes([[[1], [2], [3]]], loss_of, parameters)
    assert (len(gave), alive) == (6, [0, 0, 0])
    assert [parameter.grad.tolist() for parameter in parameters if parameter.grad is not None] == [[12.0] * 3, [24.0] * 3]


@pytest.mark.usefixtures("two_threads")
def test_what_a_lane_raises_is_raised() -> None:
    def loss_of(piece: list[int]) -> torch.Tensor:
        raise FloatingPointError(f"piece {piece[0]}")

    with pytest.raises(FloatingPointError, match="piece"):
        run_lanes([[[1]], [[2]]], loss_of, [torch.nn.Parameter(torch.ones(3))])
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("dora", "shared"), [(False, True), (True, False)])
def test_a_weight_that_is_put_back_in_every_pass_is_not_shared(tiny_model_dir: Path, dora: bool, shared: bool) -> None:
    """Of two lanes, one would find it without its scales: PEFT replaces the parameter of 8 bits that DoRA reads."""
    tuning = Lora(method="lora", rank=4, alpha=8, targets="all-linear", dora=dora)
    model = attach(load_base(tiny_model_dir, EightBit(method="int8"), torch.float32, CPU), tuning)
    accelerate(model, tuning)
    assert can_share(Scorer(model, CPU, "fp32"), 1) is shared


def test_dropout_several_processes_and_padded_models_are_not_shared(tiny_model_dir: Path) -> None:
    scorer = make_scorer(tiny_model_dir)
    assert can_share(scorer, 1)
    assert not can_share(scorer, 2)
    assert not can_share(make_scorer(tiny_model_dir, dropout=0.1), 1)
    scorer.model.gradient_checkpointing_enable()
    assert not can_share(scorer, 1)
    plain = Scorer(attach(load_base(tiny_model_dir, NONE, torch.float32, CPU), Lora(method="lora", rank=4)), CPU, "fp32")
    assert not can_share(plain, 1)
