"""Losses through the head, whatever the model does with its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, FalconH1Config, Gemma2Config, GraniteConfig, LlamaConfig, RecurrentGemmaConfig

from finetune.model.head import _plain, causal_model, has_plain_head, hidden_losses, target_losses

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
CONFIGS: dict[str, tuple[Any, bool]] = {
    "llama": (LlamaConfig(**SIZES), True),
    "llama-tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), True),
    "granite": (GraniteConfig(**SIZES, logits_scaling=4.0), False),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.25), False),
    "gemma2": (Gemma2Config(**SIZES, head_dim=8), False),
    "falcon-h1": (FalconH1Config(**SIZES, **MAMBA, lm_head_multiplier=0.5), False),
    "recurrent-gemma": (RecurrentGemmaConfig(**SIZES, lru_width=32), False),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name][0]).float().eval()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    supervised[:, 5:] = True
    return ids, torch.ones_like(ids), supervised


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_the_models_own_logits(name: str) -> None:
    model = build(name)
    ids, attention, supervised = batch()
    with torch.no_grad():
        losses = target_losses(model, ids, attention, supervised)
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    expected = functional.cross_entropy(logits[:, :-1][supervised[:, 1:]], ids[:, 1:][supervised[:, 1:]], reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    assert has_plain_head(model) is CONFIGS[name][1]


def test_the_measurement_leaves_no_trace() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)).train()
    core = causal_model(model)
    core.model.norm.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    ids, attention, supervised = batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert has_plain_head(core)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(module._forward_hooks for module in core.modules())
        # a training step in the same autocast block still reaches every weight
        target_losses(model, ids, attention, supervised).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert core in _plain


def test_a_model_in_half_precision_with_fp32_embeddings_is_measured() -> None:
    model = build("llama").to(torch.bfloat16)
    model.get_input_embeddings().float()
    assert has_plain_head(model)


def test_wide_hidden_states_meet_a_narrow_head() -> None:
    head = torch.nn.Linear(8, 20, bias=False, dtype=torch.bfloat16)
    hidden, targets = torch.randn(5, 8, requires_grad=True), torch.arange(5)
    losses = hidden_losses(hidden, head, targets)
    expected = functional.cross_entropy(head(hidden.bfloat16()).float(), targets, reduction="none")
    assert torch.equal(losses, expected)
    losses.sum().backward()
    assert hidden.grad is not None
