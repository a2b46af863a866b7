"""The operations that the limit counts, against torch's own counter."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.engine.limit import Linear, Shape, limit, measure, operations

_RANK, _LENGTH = 4, 24


def _config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )


def _totals(supervised: int) -> dict[str, int]:
    return {"tokens": _LENGTH, "supervised_tokens": supervised, "squared_tokens": _LENGTH**2}


def test_operations_are_those_that_torch_counts() -> None:
    config = _config()
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=_RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.randint(100, (1, _LENGTH))).logits.sum().backward()
    counts = {str(name): value for name, value in counter.get_flop_counts()["Global"].items()}
    parts = operations(Shape.of(json.loads(config.to_json_string())), _RANK, _totals(_LENGTH))
    # attention without the causal mask: s^2 instead of s(s+1)/2
    assert counts["aten.bmm"] == parts["attention"] * 2 * _LENGTH // (_LENGTH + 1)
    # the first layer's LoRA needs no gradient of its input either (3 layers, q k v): the limit counts it, at less than a thousandth
    unneeded = 2 * _RANK * 3 * 32 * _LENGTH
    assert counts["aten.mm"] == parts["frozen"] + parts["lora"] + parts["head"] - unneeded


def test_only_supervised_positions_reach_the_head() -> None:
    shape = Shape.of(json.loads(_config().to_json_string()))
    assert operations(shape, _RANK, _totals(0))["head"] == 0
    assert operations(shape, _RANK, _totals(5))["head"] == 4 * 32 * 100 * 5


def test_the_limit_is_time_at_each_parts_rate() -> None:
    parts = {"frozen": 600, "lora": 200, "attention": 200, "head": 500}
    assert limit(parts, {"layers": 100.0, "head": 50.0}, tokens=40) == pytest.approx(40 / (10 + 10))


def test_rates_are_measured_in_every_repeat() -> None:
    linear = Linear(8, 16)
    found = measure(Shape(1, (linear,), (linear,), linear, 8), torch.float32, repeats=3)
    assert {part: len(rates) for part, rates in found.items()} == {"layers": 3, "head": 3, "layers_cpu": 3, "head_cpu": 3}
    assert all(rate > 0 for rate in (*found["layers"], *found["head"]))
