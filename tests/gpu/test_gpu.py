"""Paths of an NVIDIA GPU: packed attention, NF4, optimizers, and a step that never waits for the device."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune.config.schema import FourBit, NoQuantization, Optimizer, Quantization
from finetune.data.batches import Batch, collate
from finetune.data.render import Example
from finetune.model import fast_lora, fast_norm
from finetune.model.head import causal_model, target_losses
from finetune.model.load import load_base
from finetune.model.packing import enable_packing
from finetune.planning.groups import assign_groups
from finetune.training.checkpoints import load_optimizer_state, optimizer_state
from finetune.training.optimizer import build_optimizer

LENGTHS = (70, 3, 130, 64, 2, 65)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}


def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    examples = []
    for length in LENGTHS:
        mask = (False, *(torch.rand(length - 1, generator=draw) < 0.6).tolist())
        examples.append(Example(tuple(torch.randint(0, 97, (length,), generator=draw).tolist()), mask, ""))
    return collate(examples)


def adapted(base: torch.nn.Module, device: torch.device) -> Any:
    """LoRA on ``base``: fp32 factors, drawn alike wherever it lies."""
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")).train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            draw = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn(parameter.shape, generator=draw).mul_(0.05).to(device)
    return model


def llama(device: torch.device, dtype: torch.dtype, groups: int) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_key_value_heads=groups)).requires_grad_(False)
    return adapted(base.to(device, dtype), device)


def gradients(model: Any, *, autocast: bool) -> dict[str, torch.Tensor]:
    rows = batch()
    model.zero_grad()
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=autocast):
        losses = target_losses(model, rows.ids, rows.attention, rows.supervised)
    losses.mean().backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative to the length of ``expected``."""
    assert found.keys() == expected.keys()
    length = sum(float(tensor.square().sum()) for tensor in expected.values()) ** 0.5
    return float(sum(float((found[name] - tensor).square().sum()) for name, tensor in expected.items()) ** 0.5) / length


@pytest.mark.parametrize("groups", [4, 2])
def test_a14_attention_of_varying_length_equals_padding(device: torch.device, flash: list[int], groups: int) -> None:
    exact = gradients(llama(torch.device("cpu"), torch.float32, groups), autocast=False)
    padded, packed = (llama(device, torch.bfloat16, groups) for _ in range(2))
    assert enable_packing(causal_model(packed))
    flash.clear()
    found = gradients(packed, autocast=True)
    assert flash == [sum(LENGTHS)] * 2  # one call a layer, over no padding
    assert distance(found, exact) <= 1.1 * distance(gradients(padded, autocast=True), exact)


def test_a14_the_fp32_path_is_exact_or_not_taken(device: torch.device, flash: list[int]) -> None:
    """The GPU's kernel has no fp32: the probe finds out, and micro-batches stay padded."""
    del flash
    model = llama(device, torch.float32, 2)
    assert enable_packing(causal_model(model)) is (device.type == "cpu")
    exact = gradients(llama(torch.device("cpu"), torch.float32, 2), autocast=False)
    assert distance(gradients(model, autocast=False), exact) <= (1e-6 if device.type == "cpu" else 1e-4)


@pytest.mark.parametrize("quantization", [NoQuantization(), FourBit(method="nf4")], ids=["none", "nf4"])
def test_our_functions_have_the_gradient_of_peft(
    device: torch.device, flash: list[int], quantization: Quantization, tiny_model_dir: Path
) -> None:
    del flash
    plain, fast = (adapted(load_base(tiny_model_dir, quantization, torch.bfloat16, device), device) for _ in range(2))
    wide = NoQuantization() if isinstance(quantization, NoQuantization) else FourBit(method="nf4", compute_dtype="fp32")
    exact = gradients(adapted(load_base(tiny_model_dir, wide, torch.float32, device), device), autocast=False)
    assert fast_norm.install(fast)
    assert fast_lora.install(fast)
    assert enable_packing(causal_model(fast))
    assert distance(gradients(fast, autocast=True), exact) <= 1.1 * distance(gradients(plain, autocast=True), exact) + 1e-6


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("method", ["adamw", "paged-adamw-32bit", "paged-adamw-8bit", "adamw-8bit", "lion-8bit"])
def test_every_optimizer_steps_and_goes_on_from_its_saved_state(device: torch.device, method: str) -> None:
    def begin() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
        draw = torch.Generator().manual_seed(0)
        parameters = {"a": torch.nn.Parameter(torch.randn(128, 64, generator=draw).to(device))}
        options = Optimizer(method=method, learning_rate=0.01, weight_decay=0.1)
        optimizer = build_optimizer(parameters, assign_groups(parameters, options), options)
        return parameters, optimizer

    def step(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
        parameters["a"].grad = torch.randn(128, 64, generator=torch.Generator().manual_seed(number)).to(device)
        optimizer.step()

    whole, first = begin()
    for number in (1, 2):
        step(whole, first, number)
    cut, second = begin()
    step(cut, second, 1)
    saved = copy.deepcopy(optimizer_state(second, cut))
    again, third = begin()
    again["a"].data.copy_(cut["a"].data)
    load_optimizer_state(third, again, *saved)
    step(again, third, 2)
    assert torch.equal(again["a"], whole["a"])
    if method == "adamw":
        assert first.param_groups[0]["fused"]
        reference = torch.nn.Parameter(begin()[0]["a"].detach().cpu())
        plain = torch.optim.AdamW([reference], lr=0.01, weight_decay=0.1, fused=False, foreach=False)
        for number in (1, 2):
            reference.grad = torch.randn(128, 64, generator=torch.Generator().manual_seed(number))
            plain.step()
        torch.testing.assert_close(whole["a"].detach().cpu(), reference.detach(), rtol=1e-6, atol=1e-6)
    if method.startswith("paged") and device.type == "cuda":
        assert first.is_paged
        assert any(getattr(value, "is_paged", False) for value in first.state[whole["a"]].values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_packed_micro_batch_never_waits_for_the_gpu(dtype: torch.dtype) -> None:
    model = llama(torch.device("cuda"), dtype, 2)
    fast_norm.install(model)
    fast_lora.install(model)
    assert enable_packing(causal_model(model))
    gradients(model, autocast=True)  # the head is measured once a run
    rows = batch()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            losses = target_losses(model, rows.ids, rows.attention, rows.supervised)
        losses.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_run_on_the_gpu_learns_what_one_on_the_cpu_does(
    write_config: Callable[..., Path], train_here: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    curves = []
    for name, seen in (("gpu", True), ("cpu", False)):
        if not seen:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        training = {"epochs": 4, "batch_size": 8, "precision": "bf16", "tokens_per_device": 256}
        run = train_here(write_config(train=training, output=str(tmp_path / name)))
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        curves.append([row["loss"] for row in rows if row["kind"] == "step"])
    assert curves[0] == pytest.approx(curves[1], rel=0.01)
