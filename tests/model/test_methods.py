"""Every method of the `tuning` union: what it trains, where it starts, that it comes back as it was, and how it is switched off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finetune.config.schema import Quantization
from finetune.errors import VerificationError
from finetune.model.adalora import load_rank_state, plan_ranks, pruned_whole, rank_state
from finetune.model.adapters import WEIGHTS, attach, is_adapter, load, read_into, save, switched_off, trainable
from finetune.model.head import target_losses
from finetune.model.methods import Given
from finetune.model.virtual import virtual_tokens
from tests.model.method_cases import (
    BASES,
    IDS,
    METHODS,
    ROWS,
    STARTS_ELSEWHERE,
    Llama,
    attached,
    base,
    losses,
    section,
    train,
)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_trained_parameters_is_the_formula(llama: Llama, name: str, base_dtype: torch.dtype) -> None:
    parameters = trainable(attached(llama, name, dtype=base_dtype))
    assert sum(parameter.numel() for parameter in parameters.values()) == METHODS[name][1]
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}


@pytest.mark.parametrize("name", METHODS)
def test_m1_the_start_is_the_base_and_so_is_the_switch(llama: Llama, name: str) -> None:
    plain = losses(base(llama))
    model = attached(llama, name)
    start = losses(model)
    assert torch.equal(start, plain) == (name not in STARTS_ELSEWHERE)
    names = list(trainable(model))
    train(model)
    assert is_adapter(model)
    assert (losses(model) - plain).abs().max() > 1e-4
    with switched_off(model):
        assert torch.equal(losses(model), plain)
        assert virtual_tokens(model) == 0
    assert (losses(model) - plain).abs().max() > 1e-4
    assert losses(model).mean() < start.mean()
    assert list(trainable(model)) == names


@pytest.mark.parametrize("name", METHODS)
def test_a11_every_tensor_gets_a_gradient_and_changes(llama: Llama, name: str) -> None:
    model = attached(llama, name)
    before = {key: parameter.detach().clone() for key, parameter in trainable(model).items()}
    target_losses(model.train(), *ROWS).mean().backward()
    assert [key for key, parameter in trainable(model).items() if parameter.grad is None] == []
    model.zero_grad()
    train(model)
    still = {key for key, parameter in trainable(model).items() if torch.equal(parameter, before[key])}
    assert still <= (pruned_whole(model) if name == "adalora" else set())


@pytest.mark.parametrize("quantization", BASES.values(), ids=BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a4_a_loaded_adapter_is_the_trained_one(
    llama: Llama, tmp_path: Path, name: str, quantization: Quantization, dtype: torch.dtype
) -> None:
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast:
        model = train(attached(llama, name, quantization, dtype))
    save(model, tmp_path)
    loaded = load(base(llama, quantization, dtype), tmp_path)
    assert not trainable(loaded)
    with autocast:
        assert torch.equal(losses(loaded), losses(model))
    # without autocast too: merging measures so
    assert losses(loaded).isfinite().all()
    assert torch.equal(losses(loaded), losses(model))
    with torch.no_grad():
        assert loaded(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_d1_a_resumed_adapter_goes_on_as_if_it_had_not_stopped(llama: Llama, tmp_path: Path, name: str) -> None:
    straight = attached(llama, name)
    train(straight)
    halted = train(attached(llama, name), steps=2)
    save(halted, tmp_path)
    torch.manual_seed(5)
    resumed = attach(base(llama), section(name), Given(seed=3))
    read_into(resumed, tmp_path)
    if name == "adalora":
        plan_ranks(resumed, section(name), 3)
        load_rank_state(resumed, *rank_state(halted))
    train(resumed, steps=1, begin=2)
    for (key, one), (other_key, other) in zip(trainable(straight).items(), trainable(resumed).items(), strict=True):
        assert key == other_key
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", METHODS)
def test_a4_a_tensor_that_is_missing_left_over_or_changed_is_noticed(llama: Llama, tmp_path: Path, name: str) -> None:
    save(train(attached(llama, name)), tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    first = min(whole)
    damaged = [{key: value for key, value in whole.items() if key != first}, whole | {f"{first}.odd": torch.ones(2)}]
    for tensors in damaged:
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(VerificationError):
            load(base(llama), tmp_path)
        with pytest.raises(VerificationError):
            read_into(attached(llama, name), tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_a12_bf16_on_request(llama: Llama, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = attach(base(llama), section(name), Given(dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.bfloat16}
    target_losses(model.train(), *ROWS).mean().backward()
    save(model, tmp_path)
    assert torch.equal(losses(load(base(llama), tmp_path)), losses(model))


@pytest.mark.parametrize("name", ["lora", "tied-lora", "adalora", "vera", "ia3", "prompt", "prefix", "norm"])
def test_peft_loads_what_is_saved(llama: Llama, tmp_path: Path, name: str) -> None:
    model = train(attached(llama, name))
    save(model, tmp_path)
    elsewhere = PeftModel.from_pretrained(base(llama), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(elsewhere(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-6)
