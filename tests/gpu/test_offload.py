"""Hidden states that wait in the host's memory, on the device that they leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune.model.offload import PinnedMemory, checkpoint_blocks

SIZES = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 16, "num_attention_heads": 8, "vocab_size": 97}
TOKENS = 8192
HIDDEN = SIZES["num_hidden_layers"] * TOKENS * SIZES["hidden_size"] * 2
"""Bytes that the blocks keep of a micro-batch with checkpointing alone: 134 MB."""


def llama(store: PinnedMemory | None) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, max_position_embeddings=TOKENS)).requires_grad_(False)
    model = get_peft_model(base.to("cuda", torch.bfloat16), LoraConfig(r=4, target_modules="all-linear")).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    checkpoint_blocks(model, store)
    return model


def step(model: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """Peak bytes of a step of two micro-batches, and its gradients."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for seed in range(2):
        ids = torch.randint(0, 97, (1, TOKENS), generator=torch.Generator().manual_seed(seed)).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.gpu
def test_peak_memory_falls_by_the_hidden_states_and_gradients_stay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # else attention adds up its gradient in the order of chance
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    step(llama(None))  # what libraries keep for themselves
    kept, expected = step(llama(None))
    moved, found = step(llama(PinnedMemory(2**32)))
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert 0.8 * HIDDEN < kept - moved < 1.1 * HIDDEN


@pytest.mark.gpu
def test_a_host_without_room_is_a_device_without_room() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="host memory"):
        step(llama(PinnedMemory(HIDDEN // 2)))
    step(llama(PinnedMemory(2**32)))  # and nothing of it stays
