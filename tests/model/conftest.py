"""Tiny random Llamas on disk, built once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def write_llama(directory: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A 2-layer Llama with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
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
    model.to(dtype).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns the directory of a tiny Llama: ``llama(tied=..., dtype=...)``."""
    made: dict[tuple[bool, torch.dtype], Path] = {}

    def get(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
        if (tied, dtype) not in made:
            made[tied, dtype] = write_llama(tmp_path_factory.mktemp("llama") / "base", tied=tied, dtype=dtype)
        return made[tied, dtype]

    return get


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, so that a test neither finds what others left there nor leaves anything."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
