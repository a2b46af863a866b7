"""Losses through the head, whatever the model does with its logits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
)

from finetune.model import fast_lora, fast_norm
from finetune.model.head import Kind, _kinds, causal_model, head_kind, hidden_losses, target_losses
from finetune.model.packing import enable_packing

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
CONFIGS: dict[str, tuple[Any, Kind]] = {
    "llama": (LlamaConfig(**SIZES), "plain"),
    "llama-tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), "plain"),
    "granite": (GraniteConfig(**SIZES, logits_scaling=4.0), "own"),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.25), "own"),
    "gemma2": (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5, attn_logit_softcapping=0.5, query_pre_attn_scalar=8), "own"),
    "falcon-h1": (FalconH1Config(**SIZES, **MAMBA, lm_head_multiplier=0.5), "own"),
    "recurrent-gemma": (RecurrentGemmaConfig(**SIZES, lru_width=32), "own"),
}
LARGE_HEADS = ("frozen", "tied", "scaled")  # tied: the head trains, and so do the embeddings
# Each kind in a process of its own, forked from one that has imported what they need.
MEMORY = """
import os, resource, sys, torch
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig
from finetune.model.head import target_losses
torch.set_num_threads(1)
sizes = dict(vocab_size=128_256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
for kind in sys.argv[1:]:
    child = os.fork()
    if not child:
        break
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"{kind} failed")
else:
    sys.exit()
if kind == "scaled":
    config = GraniteConfig(**sizes, logits_scaling=4.0)
else:
    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=kind == "tied")
model = AutoModelForCausalLM.from_config(config)
model.get_output_embeddings().requires_grad_(kind == "tied")
def train(rows):
    ids = torch.arange(4 * rows).view(4, rows)
    target_losses(model, ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool)).mean().backward()
    assert (model.get_output_embeddings().weight.grad is None) == (kind in ("frozen", "scaled"))
train(9)  # what training needs once: gradients of all weights, and whatever libraries load late
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train(1025)
print(kind, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def build(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name][0]).float().eval()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(ids)
    attention[1, 9:] = 0
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    supervised[:, 5:9] = True
    supervised[0, 10] = True
    return ids, attention, supervised


def textbook(model: Any) -> torch.Tensor:
    """Losses from all the logits of plain transformers, each row alone."""
    found = []
    for ids, attention, supervised in zip(*batch(), strict=True):
        length = int(attention.sum())
        logits = model(input_ids=ids[None, :length], use_cache=False).logits[0, :-1]
        losses = functional.cross_entropy(logits, ids[1:length], reduction="none")
        found.append(losses[supervised[1:length]])
    return torch.cat(found)


def gradients(model: Any, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses.sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_the_models_own_logits(name: str, kernels: str) -> None:
    model = build(name)
    losses = textbook(model)
    expected = gradients(model, losses)
    if kernels == "auto":  # weights train here, so that the library keeps its norms; frozen ones are compared below
        enable_packing(model)
    found = target_losses(model, *batch())
    torch.testing.assert_close(found, losses, atol=1e-5, rtol=0)
    got = gradients(model, found)
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        assert float((got[key] - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), 1.0), key
    assert head_kind(model) == CONFIGS[name][1]


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2"])
def test_scaled_and_capped_heads_are_right_with_every_kernel(name: str) -> None:
    def adapted() -> Any:
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return get_peft_model(build(name), config).train()

    plain, fast = adapted(), adapted()
    losses = textbook(plain)
    fast_norm.install(fast)
    enable_packing(causal_model(fast))
    fast_lora.install(fast)
    found = target_losses(fast, *batch())
    torch.testing.assert_close(found, losses, atol=1e-5, rtol=0)
    expected, got = gradients(plain, losses), gradients(fast, found)
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        assert float((got[key] - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), 1.0), key


class Shifted(LlamaForCausalLM):
    """A head that also looks at the input: it cannot be had without the body."""

    def forward(self, input_ids: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)
        if input_ids is not None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = output.logits + functional.one_hot(input_ids[:, keep], 97)
            self.computed = output.logits.shape[1]
        return output


def test_a_model_that_cannot_be_taken_apart_is_run_whole_at_the_supervised_positions_alone() -> None:
    torch.manual_seed(0)
    model = Shifted(LlamaConfig(**SIZES)).eval()
    losses = textbook(model)
    found = target_losses(model, *batch())
    assert head_kind(model) == "whole"
    torch.testing.assert_close(found, losses, atol=1e-5, rtol=0)
    assert model.computed == 5  # of twelve columns


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    """MB that 4,096 tokens of 128,256 words take beside the model, by kind of head."""
    done = subprocess.run([sys.executable, "-c", MEMORY, *LARGE_HEADS], capture_output=True, text=True, check=True)
    return {kind: float(peak) for kind, peak in map(str.split, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.xdist_group("large-heads")  # measured once, and not by every worker
@pytest.mark.parametrize("kind", LARGE_HEADS)
def test_b5_4096_tokens_of_128256_words_train_in_a_gigabyte(peaks: dict[str, float], kind: str) -> None:
    assert peaks[kind] < 1000  # their logits are 2,100 MB, and as much again for each pass over them


def test_the_measurement_leaves_no_trace() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)).train()
    core = causal_model(model)
    core.model.norm.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    ids, attention, supervised = batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert head_kind(core) == "plain"
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(module._forward_hooks for module in core.modules())
        # a training step in the same autocast block still reaches every weight
        target_losses(model, ids, attention, supervised).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert core in _kinds


def test_a_model_in_half_precision_with_fp32_embeddings_is_measured() -> None:
    model = build("llama").to(torch.bfloat16)
    model.get_input_embeddings().float()
    assert head_kind(model) == "plain"


def test_wide_hidden_states_meet_a_narrow_head() -> None:
    head = torch.nn.Linear(8, 20, bias=False, dtype=torch.bfloat16)
    hidden, targets = torch.randn(5, 8, requires_grad=True), torch.arange(5)
    losses = hidden_losses(hidden, head, targets)
    expected = functional.cross_entropy(head(hidden.bfloat16()).float(), targets, reduction="none")
    assert torch.equal(losses, expected)
    losses.sum().backward()
    assert hidden.grad is not None
