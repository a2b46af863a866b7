"""What an adapter's files tell of its updates, against numpy on the dense matrices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune import api
from finetune.analysis.checks import no_factors
from finetune.analysis.used_rank import used_ranks
from finetune.runs import RunDirectory


def test_rank_and_size_of_each_update(write_config: Callable[..., Path], train_here: Callable[..., Path]) -> None:
    run = RunDirectory(train_here(write_config()))
    config = api.load_config(run.config).config
    assert no_factors(run, config) is None
    found = {one.module: one for one in used_ranks(run, config)}
    stored: dict[str, Any] = load_file(run.adapter / "adapter_model.safetensors")
    scale = json.loads((run.adapter / "adapter_config.json").read_text())["lora_alpha"] / 4
    assert len(found) == 14
    for name, one in found.items():
        a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        delta = scale * b @ a
        sigma = np.linalg.svd(delta, compute_uv=False)[:4]
        shares = sigma / sigma.sum()
        assert one.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
        assert one.size == pytest.approx(np.sqrt((delta**2).mean()), rel=1e-6)
        assert (one.rank, one.role) == (4, "attention" if "self_attn" in name else "mlp")


def test_methods_without_factors_say_so(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = api.load_config(write_config(tuning={"method": "ia3"})).config
    assert "ia3 has no low-rank factors" in str(no_factors(RunDirectory(tmp_path), config))
