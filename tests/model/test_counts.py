"""How many parameters adapters have, against the formula, for the shapes of ten architectures; nothing is loaded or downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from finetune.config.schema import Lora
from finetune.model.adapters import attach, trainable

LAYERS = 2
"""Built with so many layers each, since all layers are alike; the figures are multiplied up to the real depth."""


def shapes(hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, **more: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "num_hidden_layers": LAYERS,
        **more,
    }


def split(hidden: int, inner: int, queries: int, values: int) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each linear module of a layer whose projections are separate."""
    return {
        "q_proj": (queries, hidden),
        "k_proj": (values, hidden),
        "v_proj": (values, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


# name -> (configuration, depth, linear modules of a layer, those of attention), the shapes as their authors publish them
ARCHITECTURES: dict[str, tuple[PretrainedConfig, int, dict[str, tuple[int, int]], tuple[str, ...]]] = {}


def add(name: str, config: PretrainedConfig, depth: int, modules: dict[str, tuple[int, int]], attention: str) -> None:
    ARCHITECTURES[name] = (config, depth, modules, tuple(attention.split()))


QKVO = "q_proj k_proj v_proj o_proj"
add("Llama-2-7B", LlamaConfig(**shapes(4096, 11008, 32, 32, 32000)), 32, split(4096, 11008, 4096, 4096), QKVO)
add("Llama-3-8B", LlamaConfig(**shapes(4096, 14336, 32, 8, 128256)), 32, split(4096, 14336, 4096, 1024), QKVO)
add("Llama-3-70B", LlamaConfig(**shapes(8192, 28672, 64, 8, 128256)), 80, split(8192, 28672, 8192, 1024), QKVO)
add("Mistral-7B", MistralConfig(**shapes(4096, 14336, 32, 8, 32000)), 32, split(4096, 14336, 4096, 1024), QKVO)
add("Qwen2.5-7B", Qwen2Config(**shapes(3584, 18944, 28, 4, 152064)), 28, split(3584, 18944, 3584, 512), QKVO)
add("Qwen3-8B", Qwen3Config(**shapes(4096, 12288, 32, 8, 151936, head_dim=128)), 36, split(4096, 12288, 4096, 1024), QKVO)
add("Gemma-2-9B", Gemma2Config(**shapes(3584, 14336, 16, 8, 256000, head_dim=256)), 42, split(3584, 14336, 4096, 2048), QKVO)
add("SmolLM2-135M", LlamaConfig(**shapes(576, 1536, 9, 3, 49152), tie_word_embeddings=True), 30, split(576, 1536, 576, 192), QKVO)
add("OLMo-2-7B", Olmo2Config(**shapes(4096, 11008, 32, 32, 100352)), 32, split(4096, 11008, 4096, 4096), QKVO)
add(
    "Phi-3-mini",
    Phi3Config(**shapes(3072, 8192, 32, 32, 32064, pad_token_id=32000)),
    32,
    {"qkv_proj": (9216, 3072), "o_proj": (3072, 3072), "gate_up_proj": (16384, 3072), "down_proj": (3072, 8192)},
    "qkv_proj o_proj",
)
neox = {key: value for key, value in shapes(6144, 24576, 64, 64, 50432).items() if key != "num_key_value_heads"}
add(
    "GPT-NeoX-20B",
    GPTNeoXConfig(**neox),
    44,
    {"query_key_value": (18432, 6144), "dense": (6144, 6144), "dense_h_to_4h": (24576, 6144), "dense_4h_to_h": (6144, 24576)},
    "query_key_value dense",
)


def counted(config: PretrainedConfig, depth: int, **tuning: Any) -> int:
    """Trainable scalars of the model at its real depth."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False)
    tuned = attach(model, Lora(method="lora", **tuning))
    total = sum(parameter.numel() for parameter in trainable(tuned).values())
    assert total % LAYERS == 0
    return total // LAYERS * depth


def formula(modules: dict[str, tuple[int, int]], depth: int, rank: int) -> int:
    return depth * sum(rank * (d_in + d_out) for d_out, d_in in modules.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trainable_parameters_follow_the_formula(name: str) -> None:
    config, depth, modules, attention = ARCHITECTURES[name]
    assert counted(config, depth, rank=16) == formula(modules, depth, 16)
    own = {module: modules[module] for module in attention}
    assert counted(config, depth, rank=16, targets="attention") == formula(own, depth, 16)
    assert counted(config, depth, rank=16, targets=attention) == formula(own, depth, 16)
    others = {module: shape for module, shape in modules.items() if module not in attention}
    assert counted(config, depth, rank=3, targets="mlp") == formula(others, depth, 3)


@pytest.mark.parametrize("name", ["Llama-2-7B", "Phi-3-mini", "Gemma-2-9B"])
def test_dora_adds_a_magnitude_for_each_output(name: str) -> None:
    config, depth, modules, _ = ARCHITECTURES[name]
    outputs = depth * sum(d_out for d_out, _ in modules.values())
    assert counted(config, depth, rank=8, dora=True) == formula(modules, depth, 8) + outputs


def test_published_figures() -> None:
    config, depth, modules, attention = ARCHITECTURES["Llama-2-7B"]
    assert counted(config, depth, rank=16, targets=attention) == 16_777_216
    assert formula({name: modules[name] for name in attention}, depth, 16) == 16_777_216
    config, depth, modules, _ = ARCHITECTURES["SmolLM2-135M"]
    assert counted(config, depth, rank=16) == 4_884_480
    assert counted(config, depth, rank=1) == 305_280
    # 2106.09685: one matrix of GPT-3 175B, d = 12288, at rank 4, and as a whole
    assert formula({"q_proj": (12288, 12288)}, 1, 4) == 98_304
    assert 12288 * 12288 == 150_994_944
