"""Parameter groups, LoRA+, decay and the schedule (M10 of the methods)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.schema import Optimizer, Schedule
from finetune.errors import ConfigError
from finetune.planning.steps import Steps
from finetune.training.optimizer import REST, assign_groups, build_optimizer, rate_factor, set_rates

NAMES = {
    "model.layers.0.self_attn.q_proj.lora_A.default.weight": (4, 8),
    "model.layers.0.self_attn.q_proj.lora_B.default.weight": (8, 4),
    "model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight": (8,),
    "model.layers.0.mlp.up_proj.lora_A.default.weight": (4, 8),
    "model.layers.0.mlp.up_proj.lora_B.default.weight": (8, 4),
    "model.embed_tokens.lora_embedding_A.default": (4, 8),
    "model.embed_tokens.lora_embedding_B.default": (8, 4),
}


@pytest.fixture
def parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in NAMES.items()}


def optimizer(**settings: object) -> Optimizer:
    return Optimizer.model_validate({"learning_rate": 0.1, "weight_decay": 0.01, **settings})


def rates(parameters: dict[str, torch.nn.Parameter], settings: Optimizer) -> dict[str, tuple[float, float]]:
    return {name: (g.learning_rate, g.weight_decay) for g in assign_groups(parameters, settings) for name in g.names}


def test_m10_every_parameter_is_in_exactly_one_group(parameters: dict[str, torch.nn.Parameter]) -> None:
    settings = optimizer(
        groups={"embeddings": {"lr_ratio": 0.1}, "mlp": {"lr_ratio": 2.0}, "lora-a": {"lr_ratio": 3.0}}, lora_plus_ratio=16.0
    )
    groups = assign_groups(parameters, settings)
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(parameters)
    assert sum(group.parameters for group in groups) == sum(p.numel() for p in parameters.values())


def test_m10_ratios_are_exact_and_compose_with_lora_plus(parameters: dict[str, torch.nn.Parameter]) -> None:
    settings = optimizer(groups={"embeddings": {"lr_ratio": 0.1, "weight_decay": 0.0}, "mlp": {"learning_rate": 0.5}}, lora_plus_ratio=16.0)
    found = rates(parameters, settings)
    assert found["model.embed_tokens.lora_embedding_A.default"] == (0.1 * 0.1, 0.0)
    assert found["model.embed_tokens.lora_embedding_B.default"] == (0.1 * 0.1 * 16, 0.0)
    assert found["model.layers.0.mlp.up_proj.lora_A.default.weight"] == (0.5, 0.01)
    assert found["model.layers.0.mlp.up_proj.lora_B.default.weight"] == (8.0, 0.01)
    assert found["model.layers.0.self_attn.q_proj.lora_A.default.weight"] == (0.1, 0.01)


def test_first_match_wins(parameters: dict[str, torch.nn.Parameter]) -> None:
    found = rates(parameters, optimizer(groups={"lora-b": {"lr_ratio": 5.0}, "mlp": {"lr_ratio": 2.0}}))
    assert found["model.layers.0.mlp.up_proj.lora_B.default.weight"][0] == 0.5
    assert found["model.layers.0.mlp.up_proj.lora_A.default.weight"][0] == 0.2


@pytest.mark.parametrize(
    ("groups", "decay"),
    [
        ({}, 0.0),
        ({"attention": {"weight_decay": 0.3}}, 0.0),
        ({"magnitudes": {"weight_decay": 0.3}}, 0.3),
        ({"magnitudes": {"lr_ratio": 2.0}}, 0.0),
    ],
)
def test_magnitudes_decay_only_when_asked(parameters: dict[str, torch.nn.Parameter], groups: dict[str, object], decay: float) -> None:
    found = rates(parameters, optimizer(groups=groups))
    assert found["model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight"][1] == decay


def test_a_group_that_matches_nothing_is_an_error(parameters: dict[str, torch.nn.Parameter]) -> None:
    with pytest.raises(ConfigError) as caught:
        assign_groups(
            parameters, optimizer(groups={"norms": {"lr_ratio": 2.0}, r"layers\.7\.": {"lr_ratio": 2.0}, "mlp": {"lr_ratio": 1.0}})
        )
    assert [problem.where for problem in caught.value.problems] == ["optimizer.groups.norms", r"optimizer.groups.layers\.7\."]
    assert "attention" in caught.value.problems[0].fix


def test_a_group_hidden_by_earlier_ones_is_an_error(parameters: dict[str, torch.nn.Parameter]) -> None:
    with pytest.raises(ConfigError, match="earlier groups took"):
        assign_groups(parameters, optimizer(groups={".": {"lr_ratio": 2.0}, "mlp": {"lr_ratio": 1.0}}))


def test_ratio_one_is_bitwise_the_run_without_groups() -> None:
    def weights(settings: Optimizer) -> torch.Tensor:
        torch.manual_seed(0)
        parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in NAMES.items()}
        groups = assign_groups(parameters, settings)
        adam = build_optimizer(parameters, groups, settings)
        for step in range(3):
            set_rates(adam, 1.0 / (step + 1))
            for parameter in parameters.values():
                parameter.grad = torch.sin(parameter.detach())
            adam.step()
        return torch.cat([p.detach().flatten() for p in parameters.values()])

    plain = weights(optimizer())
    assert torch.equal(plain, weights(optimizer(groups={"mlp": {"lr_ratio": 1.0}, "lora-b": {"lr_ratio": 1.0}}, lora_plus_ratio=1.0)))
    assert not torch.equal(plain, weights(optimizer(groups={"mlp": {"lr_ratio": 1.5}})))


def test_the_rest_has_a_name(parameters: dict[str, torch.nn.Parameter]) -> None:
    assert {g.name for g in assign_groups(parameters, optimizer())} == {REST, f"{REST}, no decay"}


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(1, 200), st.integers(0, 50))
def test_the_schedule_rises_then_falls_inside_its_bounds(method: str, total: int, warmup: int) -> None:
    schedule = Schedule.model_validate({"method": method, "min_lr_ratio": 0.1})
    steps = Steps(per_epoch=total, total=total, warmup=min(warmup, total))
    factors = [rate_factor(schedule, steps, step) for step in range(total)]
    assert all(0 < factor <= 1.0 + 1e-12 for factor in factors)
    rising, falling = factors[: steps.warmup], factors[steps.warmup :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


def test_the_cosine_agrees_with_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup

    schedule, steps = Schedule(), Steps(per_epoch=40, total=40, warmup=5)
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(dummy, 5, 40)
    for step in range(40):
        # transformers' warm-up starts with a step of rate zero; ours with the first positive one
        wanted = dummy.param_groups[0]["lr"] if step >= 5 else (step + 1) / 5
        assert rate_factor(schedule, steps, step) == pytest.approx(wanted, abs=1e-12)
        dummy.step()
        theirs.step()
