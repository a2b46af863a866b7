"""Every optimizer in the loop: it learns, and a run that lost its last steps and is resumed ends bitwise where it would have."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

# rank 64 of 64 columns makes factors of 4,096 elements, from where on bitsandbytes keeps 8 bits
LORA = {"method": "lora", "rank": 64, "alpha": 64, "targets": "mlp"}
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw-8bit": {},
    "paged-adamw-8bit": {},
    "paged-adamw-32bit": {},
    "adafactor": {},
    "lion": {"optimizer": {"learning_rate": 0.003}},
    "lion-8bit": {"optimizer": {"learning_rate": 0.003}},
    "muon": {},
    "galore": {"tuning": {"method": "full"}, "optimizer": {"galore": {"rank": 16, "every_steps": 2}}},
    "auto": {},
    "adamw, bf16": {"train": {"trainable_dtype": "bf16"}},
    "muon, bf16": {"train": {"trainable_dtype": "bf16"}},
}


def result(run: Path) -> str:
    path = next(path for path in (run / "adapter" / "adapter_model.safetensors", run / "model" / "model.safetensors") if path.is_file())
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", RUNS)
def test_d1_a_run_resumes_bitwise_with_every_optimizer(
    name: str, write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path
) -> None:
    changes, method = RUNS[name], name.partition(",")[0]
    train = {"epochs": 2, "batch_size": 8, "precision": "fp32", "tokens_per_device": 512, "checkpoint": {"every_steps": 2, "keep": 9}}
    config = write_config(
        tuning=changes.get("tuning", LORA),
        optimizer={"method": method, "learning_rate": 0.01, **changes.get("optimizer", {})},
        train={**train, **changes.get("train", {})},
        output=str(tmp_path / "run"),
    )
    run = train_here(config)
    whole = result(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    assert losses[-1] < losses[0]
    # as if the machine had failed in the fourth step
    for path in [run / "adapter", run / "model", *(run / "checkpoints").iterdir()]:
        if path.is_dir() and path.name not in ("step-00000000", "step-00000002"):
            shutil.rmtree(path)
    assert train_here(config, resume=True) == run
    assert result(run) == whole
    assert json.loads((run / "plan.json").read_text())["resolved"]["optimizer"]["value"] == ("adamw" if method == "auto" else method)
    if "bf16" in name:
        state = load_file(max((run / "checkpoints").iterdir()) / "optimizer.safetensors")
        assert {str(value.dtype) for key, value in state.items() if not key.endswith("/step")} == {"torch.bfloat16"}
