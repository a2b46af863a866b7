"""Models whose experts are one 3-D parameter."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from finetune.config.schema import Lora
from finetune.errors import ConfigError
from finetune.model.targets import find_targets

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
