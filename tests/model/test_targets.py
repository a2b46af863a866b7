"""Models whose experts are one 3-D parameter, and targets by Spectrum."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from finetune.config.schema import Full, Lora
from finetune.errors import ConfigError, VerificationError
from finetune.model.adapters import attach
from finetune.model.methods import Given
from finetune.model.targets import find_targets
from finetune.planning.targets import chosen

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))


def qwen() -> Any:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=2, moe_intermediate_size=16))


@pytest.mark.parametrize("model", [mixtral, qwen])
@pytest.mark.parametrize("targets", ["mlp", "all-linear"])
def test_fused_experts_are_not_left_out_silently(model: Any, targets: Literal["mlp", "all-linear"]) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.experts\.\w+_proj") as error:
        find_targets(model(), Lora(method="lora", targets=targets))
    assert error.value.problems[0].where == "tuning.targets"
    assert "attention" in error.value.problems[0].fix


def test_what_can_be_adapted_beside_fused_experts_is_found_by_name() -> None:
    attention = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo"]
    assert find_targets(mixtral(), Lora(method="lora", targets="attention")) == attention
    assert find_targets(mixtral(), Lora(method="lora", targets=["q_proj"])) == attention[:1]


def test_all_linear_of_a_dense_model() -> None:
    assert len(find_targets(LlamaForCausalLM(LlamaConfig(**SIZES)), Lora(method="lora"))) == 7


def llama(layers: int = 4) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers}))


def test_spectrum_targets_are_full_names_of_the_best_layers_of_each_type() -> None:
    model = llama()
    names = [name for name, module in model.named_modules() if name.endswith("_proj")]
    ratios = {name: float(number % 3) for number, name in enumerate(names)}
    found = find_targets(model, Lora.model_validate({"method": "lora", "targets": {"spectrum": 0.5}}), ratios)
    assert found == [name for name in names if name in chosen(ratios, 0.5)]
    assert len(found) == 14
    assert Counter(name.rpartition(".")[2] for name in found) == dict.fromkeys({name.rpartition(".")[2] for name in names}, 2)


def test_spectrum_targets_without_ratios_or_with_those_of_another_model_are_refused() -> None:
    tuning = Lora.model_validate({"method": "lora", "targets": {"spectrum": 0.5}})
    with pytest.raises(ValueError, match="ratios"):
        find_targets(llama(1), tuning)
    with pytest.raises(VerificationError, match=r"layers\.1\..* has no signal-to-noise ratio"):
        find_targets(llama(2), tuning, {name: 1.0 for name, _ in llama(1).named_modules()})


def test_a_choice_of_one_type_does_not_spill_to_layers_that_end_alike() -> None:
    """PEFT matches target names as suffixes: `1.q_proj` would be `11.q_proj` too if names were not whole."""
    model = llama(12)
    ratios = {name: float(".layers.1." in name) for name, _ in model.named_modules() if name.endswith("_proj")}
    found = find_targets(model, Lora.model_validate({"method": "lora", "targets": {"spectrum": 0.1}}), ratios)
    assert {name.split(".")[2] for name in found} == {"1"}
    trained = get_peft_model(model, LoraConfig(r=2, target_modules=found))
    adapted = {name for name, _ in trained.named_parameters() if ".lora_A." in name}
    assert len(adapted) == 7
    assert all(".layers.1." in name for name in adapted)


@pytest.mark.parametrize("model", [mixtral, qwen])
def test_full_tuning_by_spectrum_does_not_leave_fused_experts_out_silently(model: Any) -> None:
    made = model()
    ratios = {name: 1.0 for name, _ in made.named_modules()}
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.experts\.\w+_proj") as error:
        attach(made, Full.model_validate({"method": "full", "targets": {"spectrum": 1.0}}), Given(ratios=ratios))
    assert "`targets: all`" in error.value.problems[0].fix
    assert attach(made, Full(method="full")).num_parameters(only_trainable=True) == made.num_parameters()
