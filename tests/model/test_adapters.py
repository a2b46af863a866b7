"""Adapters that are loaded again: every value as it was trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.config.schema import FourBit, Lora, NoQuantization, Quantization
from finetune.errors import VerificationError
from finetune.model.adapters import WEIGHTS, _require_equal, attach, load, save, switched_off
from finetune.model.head import target_losses
from finetune.model.load import load_base

IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
ROWS = (IDS, torch.ones_like(IDS), torch.ones_like(IDS, dtype=torch.bool))


def trained(base: Path, directory: Path, quantization: Quantization, tuning: Lora) -> Any:
    """An adapter whose values do not lie on the bf16 grid, saved to ``directory``."""
    torch.manual_seed(0)
    model = attach(load_base(base, quantization, torch.bfloat16, torch.device("cpu")), tuning)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape)
    save(model, directory)
    return model.eval()


def losses(model: Any, *, autocast: bool) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return target_losses(model, *ROWS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", [NoQuantization(), FourBit(method="nf4")], ids=["bf16", "nf4"])
@pytest.mark.parametrize("embeddings", ["full", "lora", "frozen"])
def test_a4_a_loaded_adapter_is_the_trained_one(
    llama: Callable[..., Path], tmp_path: Path, quantization: Quantization, embeddings: Any, tied: bool
) -> None:
    base = llama(tied=tied, dtype=torch.bfloat16)
    model = trained(base, tmp_path, quantization, Lora(method="lora", rank=4, embeddings=embeddings, dora=True))
    loaded = load(load_base(base, quantization, torch.bfloat16, torch.device("cpu")), tmp_path).eval()
    live = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert live[name].dtype == parameter.dtype, name
        assert torch.equal(live[name], parameter), name
    assert torch.equal(losses(loaded, autocast=True), losses(model, autocast=True))


@pytest.mark.parametrize("train", [True, False])
def test_fp32_embeddings_and_a_bf16_head_work_without_autocast(llama: Callable[..., Path], tmp_path: Path, train: bool) -> None:
    tuning = Lora(method="lora", rank=4, embeddings="full")
    base = llama(tied=True, dtype=torch.bfloat16)
    quantization = FourBit(method="nf4", compute_dtype="bf16")
    model = trained(base, tmp_path, quantization, tuning)
    if train:
        target_losses(model.train(), *ROWS).sum().backward()
        assert model.get_base_model().get_input_embeddings().modules_to_save["default"].weight.grad.any()
    loaded = load(load_base(base, quantization, torch.bfloat16, torch.device("cpu")), tmp_path).eval()
    assert losses(loaded, autocast=False).isfinite().all()
    assert loaded(input_ids=IDS).logits.isfinite().all()


def test_a_rounded_copy_is_not_equal(llama: Callable[..., Path], tmp_path: Path) -> None:
    base = llama(dtype=torch.bfloat16)
    model = trained(base, tmp_path, NoQuantization(), Lora(method="lora", rank=4, embeddings="full"))
    copy = model.get_base_model().get_input_embeddings().modules_to_save["default"].weight
    stored = load_file(tmp_path / WEIGHTS)
    copy.data = copy.data.bfloat16()
    with pytest.raises(VerificationError, match=r"embed_tokens\.weight differs from the file"):
        _require_equal(model, tmp_path)
    save_file({**stored, "base_model.model.odd": torch.ones(2)}, tmp_path / WEIGHTS)
    with pytest.raises(VerificationError, match="not used"):
        load(load_base(base, NoQuantization(), torch.bfloat16, torch.device("cpu")), tmp_path)


def test_the_user_is_not_told_how_peft_would_merge(llama: Callable[..., Path], tmp_path: Path) -> None:
    base = llama(tied=True, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained(base, tmp_path, NoQuantization(), Lora(method="lora", rank=4, embeddings="full"))
        load(load_base(base, NoQuantization(), torch.bfloat16, torch.device("cpu")), tmp_path)


def test_an_exception_inside_switched_off_leaves_what_trains_as_it_was(llama: Callable[..., Path], tmp_path: Path) -> None:
    base = llama(dtype=torch.bfloat16)
    trained(base, tmp_path, NoQuantization(), Lora(method="lora", rank=4, embeddings="full"))
    model = load(load_base(base, NoQuantization(), torch.bfloat16, torch.device("cpu")), tmp_path)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(KeyError), switched_off(model):
        raise KeyError
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
