"""Every shipped configuration and recipe is planned: each "auto" decided, steps counted, for a CPU and a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.hardware import Machine
from finetune.planning.resolve import resolve
from finetune.planning.steps import count_steps

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
CPU = Machine("cpu", "a CPU without bf16", 2, 24 * 2**30, bf16=False)
GPU = Machine("cuda", "a GPU", 8, 80 * 2**30, bf16=True)


def test_there_is_something_to_plan() -> None:
    assert len(CONFIGS) >= 7
    assert len(RECIPES) >= 8


def config_of(path: Path, folder: Path) -> Config:
    if path in CONFIGS:
        return load_config(path).config
    run = folder / "run.yaml"
    run.write_text(json.dumps({"extends": str(path), "model": {"id": "x/y"}, "data": {"train": [{"source": "a.jsonl"}]}, "output": "out"}))
    return load_config(run).config


@pytest.mark.parametrize("path", [*CONFIGS, *RECIPES], ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.parametrize("machine", [CPU, GPU], ids=lambda machine: machine.kind)
def test_every_yaml_is_planned(path: Path, machine: Machine, tmp_path: Path) -> None:
    config = config_of(path, tmp_path)
    resolved = resolve(config, machine)
    assert resolved.tokens_per_device.value >= 16
    for choice in (
        resolved.precision,
        resolved.compute_dtype,
        resolved.tokens_per_device,
        resolved.gradient_checkpointing,
        resolved.strategy,
        resolved.optimizer,
    ):
        assert choice.value != "auto"
        assert choice.reason
    if config.train.precision == "auto":
        assert resolved.precision.value == ("bf16" if machine.bf16 else "fp32")
    steps = count_steps(config, 1000)
    assert 0 <= steps.warmup <= steps.total
    assert steps.total == min(steps.per_epoch * config.train.epochs, config.train.max_steps or 10**9)


def test_a_partial_batch_counts_as_a_step() -> None:
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", ["train.batch_size=10", "train.epochs=2", "schedule.warmup_ratio=0.1"]
    ).config
    assert count_steps(config, 101) == count_steps(config, 110)
    assert (count_steps(config, 101).per_epoch, count_steps(config, 101).total, count_steps(config, 101).warmup) == (11, 22, 2)


@pytest.mark.parametrize(
    ("machine", "stated", "expected"), [(CPU, "auto", "adamw"), (GPU, "auto", "paged-adamw-8bit"), (GPU, "lion", "lion")], ids=str
)
def test_the_optimizer_is_chosen_for_the_machine(machine: Machine, stated: str, expected: str) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", [f"optimizer.method={stated}"]).config
    choice = resolve(config, machine).optimizer
    assert choice.value == expected
    assert ("stated" in choice.reason) == (stated != "auto")


def test_a2_a_resumed_run_keeps_its_optimizer_and_types_on_another_machine() -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["optimizer.method=auto"]).config
    started = resolve(config, GPU)
    resumed = resolve(config, CPU).pinned(**started.types())
    assert (resumed.optimizer.value, resumed.precision.value, resumed.compute_dtype.value) == ("paged-adamw-8bit", "bf16", "bf16")
    assert resumed.types() == started.types()
    assert resumed.tokens_per_device == resolve(config, CPU).tokens_per_device


def test_a_run_without_a_recorded_optimizer_keeps_the_stated_one() -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["optimizer.method=adamw-8bit"]).config
    assert resolve(config, CPU).pinned("fp32", "fp32").optimizer.value == "adamw-8bit"


def test_prefix_tuning_never_recomputes_activations() -> None:
    config = load_config(ROOT / "configs" / "cpu-smoke.yaml", ["tuning={method: prefix}"]).config
    assert resolve(config, GPU).gradient_checkpointing.value is False
