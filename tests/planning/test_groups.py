"""Parameter groups, LoRA+ and decay (M10 of the methods)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from finetune.config.schema import ROLES, Optimizer
from finetune.errors import ConfigError
from finetune.model.adapters import trainable
from finetune.planning.groups import REST, assign_groups
from finetune.planning.targets import roles_of
from finetune.training.optimizer import build_optimizer, set_rates

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


# --- any groups over any model's names ------------------------------------------------------------------------------------------------

PLACES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "self_attn.q_norm"]
SUFFIXES = {
    "lora_A.default.weight": (4, 8),
    "lora_B.default.weight": (8, 4),
    "lora_magnitude_vector.default.weight": (8,),
    "lora_E.default": (4, 1),
    "vera_lambda_b.default": (8,),
    "ia3_l.default": (8, 1),
    "weight": (8, 8),
    "bias": (8,),
}
OTHERS = {
    "model.embed_tokens.weight": (12, 8),
    "model.embed_tokens.token_adapter.trainable_tokens_delta.default": (2, 8),
    "model.embed_tokens.modules_to_save.default.weight": (12, 8),
    "prompt_encoder.default.embedding.weight": (3, 8),
    "lm_head.weight": (12, 8),
    "model.norm.weight": (8,),
}
SHAPES = {f"model.layers.{layer}.{place}.{suffix}": shape for layer in (0, 1) for place in PLACES for suffix, shape in SUFFIXES.items()}
ENTRIES = st.sampled_from([*ROLES, r"layers\.1\.", "q_proj", r"\.weight$", "down|norm"])
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "weight_decay": st.sampled_from([0.0, 0.5]),
        "lr_ratio": st.sampled_from([0.1, 1.0, 3.0, 16.0]),
    },
)


@hypothesis_settings(deadline=None)  # the machine may be busy
@given(
    st.sets(st.sampled_from(sorted({**SHAPES, **OTHERS})), min_size=1),
    st.dictionaries(ENTRIES, SETTINGS, max_size=4),
    st.sampled_from([1.0, 4.0, 16.0]),
    st.sampled_from(["adamw", "muon"]),
)
def test_m10_no_parameter_is_lost_or_doubled_and_every_rate_is_exact(
    names: set[str], groups: dict[str, dict[str, float]], ratio: float, method: str
) -> None:
    shapes = {**SHAPES, **OTHERS}
    parameters = {name: torch.nn.Parameter(torch.zeros(shapes[name])) for name in sorted(names)}
    settings = optimizer(groups=groups, lora_plus_ratio=ratio, method=method)
    try:
        found = assign_groups(parameters, settings)
    except ConfigError as error:
        # an entry without effect, or nothing for muon: never a silent choice
        if not all(problem.where.startswith(("optimizer.groups.", "optimizer.method")) for problem in error.problems):
            raise
        return
    assert sorted(name for group in found for name in group.names) == sorted(parameters)
    assert sum(group.parameters for group in found) == sum(parameter.numel() for parameter in parameters.values())
    for group in found:
        for name in group.names:
            entry = next((key for key in settings.groups if matches(key, name)), None)
            stated = groups.get(entry or "", {})
            rate = 0.1 * stated.get("lr_ratio", 1.0)
            assert group.learning_rate == (rate * ratio if "lora-b" in roles_of(name) else rate)
            asked = "weight_decay" in stated and (
                entry in ("norms", "magnitudes")
                or (entry not in ROLES and not any(is_matrix(each) for each in names if matches(entry, each)))
            )
            assert group.weight_decay == (stated.get("weight_decay", 0.01) if is_matrix(name) or asked else 0.0)


def is_matrix(name: str) -> bool:
    return len({**SHAPES, **OTHERS}[name]) == 2 and not {"magnitudes", "norms"} & set(roles_of(name))


def matches(entry: str, name: str) -> bool:
    return entry in roles_of(name) if entry in ROLES else re.search(entry, name) is not None


def test_m10_a_tied_head_is_in_one_group() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    parameters = trainable(model)
    groups = assign_groups(parameters, optimizer(groups={"embeddings": {"lr_ratio": 0.1}}))
    members = [id(parameters[name]) for group in groups for name in group.names]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    assert sum(group.parameters for group in groups) == model.num_parameters()
    with pytest.raises(ConfigError, match="'lm_head' matches no trainable parameter"):
        assign_groups(parameters, optimizer(groups={"lm_head": {"lr_ratio": 0.1}}))


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_E.default", {"magnitudes", "attention"}),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default", {"lora-b", "attention"}),
        ("base_model.model.model.layers.0.mlp.up_proj.vera_lambda_d.default", {"magnitudes", "mlp"}),
        ("base_model.model.model.layers.0.mlp.down_proj.ia3_l.default", {"magnitudes", "mlp"}),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default", {"embeddings"}),
        ("prompt_encoder.default.embedding.weight", {"embeddings"}),
        ("model.layers.3.self_attn.k_norm.weight", {"norms", "attention"}),
        ("model.layers.3.self_attn.k_proj.bias", {"attention"}),
        ("model.norm.weight", {"norms"}),
        ("model.layers.0.mlp.houlsby.down.weight", {"mlp"}),
        ("model.layers.0.self_attn.q_proj.bitfit.bias", {"attention"}),
        ("transformer.wpe.weight", {"embeddings"}),
    ],
)
def test_every_methods_names_have_roles(name: str, roles: set[str]) -> None:
    assert set(roles_of(name)) == roles


def test_ratio_one_gives_the_same_adapter_file(write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path) -> None:
    """LoRA+ with ratio 1 and groups with ratio 1: bitwise the run without them, and the table is in plan.json."""
    short = {"epochs": 1, "batch_size": 8, "precision": "fp32", "tokens_per_device": 256}
    ones = {"learning_rate": 0.01, "lora_plus_ratio": 1.0, "groups": {"mlp": {"lr_ratio": 1.0}, "lora-b": {"lr_ratio": 1.0}}}
    digests = {}
    for name, stated in {"plain": {"learning_rate": 0.01}, "ones": ones}.items():
        config = write_config(f"{name}.yaml", optimizer=stated, train=short, output=str(tmp_path / name))
        run = train_here(config)
        digests[name] = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert digests["plain"] == digests["ones"]
    table = json.loads((tmp_path / "ones" / "plan.json").read_text())["groups"]
    assert [group["name"] for group in table] == ["mlp", "lora-b", "(rest)"]
    assert all({"parameters", "learning_rate", "weight_decay", "tensors"} <= group.keys() for group in table)


@pytest.mark.parametrize(
    ("entry", "decayed"),
    [
        (r"layers\.1\.", {"model.layers.1.self_attn.q_proj.weight"}),
        (r"layers\.1\..*norm", {"model.layers.1.input_layernorm.weight"}),
        (r"\.bias$", {"model.layers.1.self_attn.q_proj.bias"}),
        ("norms", {"model.layers.1.input_layernorm.weight"}),
        ("attention", {"model.layers.1.self_attn.q_proj.weight"}),
    ],
)
def test_m10_a_pattern_decays_vectors_only_where_it_matches_nothing_else(entry: str, decayed: set[str]) -> None:
    names = ["self_attn.q_proj.weight", "self_attn.q_proj.bias", "input_layernorm.weight"]
    made = {f"model.layers.1.{name}": torch.nn.Parameter(torch.zeros((8, 8) if "proj.weight" in name else (8,))) for name in names}
    found = rates(made, optimizer(groups={entry: {"weight_decay": 0.3}}))
    assert {name for name, (_, decay) in found.items() if decay == 0.3} == decayed
