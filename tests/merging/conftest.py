"""Tiny Llamas with adapters whose every tensor is random, so that each of them shows in the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from finetune.config.schema import FourBit, LoftqInit, Lora, NoQuantization, Quantization
from finetune.merging.inputs import MergeSource
from finetune.model.loftq import Quantizer, apply_loftq, save_base_correction
from finetune.model.quantize import bnb_config, disable_cpu_repacking

TOKENS = torch.randint(0, 97, (3, 16), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Case:
    """One adapter on one base."""

    tied: bool = False
    stored: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    quantization: Quantization = field(default_factory=NoQuantization)
    lora: dict[str, Any] = field(default_factory=dict)
    loftq: int = 0
    shards: bool = False


@dataclass(frozen=True)
class Made:
    """What a case made: the live adapter model and its directories."""

    model: Any
    source: MergeSource
    tokens: torch.Tensor = field(default_factory=lambda: TOKENS)

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.model(self.tokens).logits.float()

    def fresh_base(self) -> Any:
        """The base as training loaded it, without adapter."""
        return load_base(self.source.base_dir, self.source.quantization, self.source.compute_dtype)


def write_llama(directory: Path, *, tied: bool, dtype: torch.dtype, shards: bool = False) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(directory, **({"max_shard_size": "60KB"} if shards else {}))
    return directory


def load_base(base: Path, quantization: Quantization, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=bnb_config(quantization, dtype))
    disable_cpu_repacking(model)
    return model.eval()


def randomize(model: Any, seed: int = 2) -> None:
    """Move every trainable tensor away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            noise = torch.randn(parameter.shape, generator=generator)
            # magnitudes and copies keep their size, factors become as large as the weights they change
            parameter.data += 0.1 * noise * (parameter.data.abs().mean() if parameter.data.any() else 1.0)


def build(case: Case, directory: Path) -> Made:
    base = write_llama(directory / "base", tied=case.tied, dtype=case.stored, shards=case.shards)
    adapter = directory / "adapter"
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **case.lora}
    model = get_peft_model(load_base(base, case.quantization, case.compute), LoraConfig(task_type="CAUSAL_LM", **settings))
    if case.loftq:
        assert isinstance(case.quantization, FourBit) or case.quantization.method == "int8"
        tuning = Lora(method="lora", rank=settings["r"], init=LoftqInit(method="loftq", iterations=case.loftq))
        report = apply_loftq(model, base, tuning, Quantizer(case.quantization, case.compute))
        adapter.mkdir()
        save_base_correction(adapter, report)
    randomize(model)
    model.save_pretrained(adapter, save_embedding_layers=False)
    return Made(model.eval(), MergeSource(base, adapter, case.quantization, case.compute, loftq=bool(case.loftq)))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """Builds a case, given by the fields of `Case`, below the test's own directory."""
    return lambda **case: build(Case(**case), tmp_path)
