"""Samples while training: what is asked, what is answered, and that training does not notice (ADR 25)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

TRAIN = {"max_steps": 4, "batch_size": 4, "precision": "fp32", "tokens_per_device": 128, "checkpoint": {"every_steps": 2}}
SAMPLES = {"every_steps": 2, "max_tokens": 5}
METHODS: dict[str, dict[str, Any]] = {
    "dropout": {"method": "lora", "rank": 4, "dropout": 0.3},
    "dora": {"method": "lora", "rank": 4, "dora": True},
    "tied-lora": {"rank": 4},
    "adalora": {"rank": 2, "init_rank": 4, "every_steps": 1},
    "vera": {"rank": 16},
    "ia3": {},
    "prompt": {"tokens": 4},
    "prefix": {"tokens": 4},
    "norm": {},
    "bitfit": {},
    "houlsby": {"bottleneck": 8},
    "full": {},
}


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


def weights(run: Path) -> dict[str, torch.Tensor]:
    directory = run / "adapter" if (run / "adapter").is_dir() else run / "model"
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("method", METHODS)
def test_training_is_bitwise_what_it_is_without_samples(
    write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path, make_tiny_model: Callable[..., Path], method: str
) -> None:
    changes = {"attention_bias": True} if method == "bitfit" else {}
    tuning = {"method": method, **METHODS[method]}
    model = {"id": str(make_tiny_model(**changes))}
    config = write_config(tuning=tuning, model=model, train=TRAIN)
    plain = train_here(config, f"output={tmp_path / 'plain'}")
    asked = train_here(config, f"output={tmp_path / 'asked'}", "train.samples.every_steps=1", "train.samples.max_tokens=5")
    wanted, got = weights(plain), weights(asked)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    assert [row["loss"] for row in rows(asked, "step")] == [row["loss"] for row in rows(plain, "step")]
    assert [row["step"] for row in rows(asked, "sample")] == [1, 2, 3, 4]
    assert all(len(row["samples"]) == 3 for row in rows(asked, "sample"))
