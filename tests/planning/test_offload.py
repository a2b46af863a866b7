"""Hidden states in host memory: counted there, chosen where nothing else fits, refused without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.errors import HardwareError
from finetune.hardware import Machine
from finetune.planning.length import DataCounts
from finetune.planning.offload import pinned_bytes
from finetune.planning.placement import machine_of_size
from finetune.planning.plan import make_plan
from finetune.planning.resolve import resolve

GIB = 2**30
LLAMA_70B, LAYERS, HIDDEN = "meta-llama/Meta-Llama-3-70B", 80, 8192
CPU = Machine("cpu", "a CPU", 2, 24 * GIB, bf16=True)
SHORT = DataCounts(rows=1000, validation_rows=20, origin="prepared", exact=True, tokens=200_000, supervised=50_000, longest=400)


def config_of(folder: Path, *overrides: str) -> Config:
    path = folder / "run.yaml"
    settings = {
        "model": {"id": LLAMA_70B},
        "quantization": {"method": "nf4"},
        "tuning": {"method": "lora", "rank": 64, "alpha": 64},
        "optimizer": {"method": "paged-adamw-8bit"},
        "data": {"train": [{"source": "a.jsonl"}], "max_tokens": 4096},
        "train": {"precision": "bf16"},
        "output": "out",
    }
    path.write_text(json.dumps(settings))
    return load_config(path, overrides).config


@pytest.mark.parametrize(("size", "pinned"), [(1, 1), (2, 2), (3, 4), (2**26, 2**26), (2**26 + 2, 2**27)])
def test_pinned_memory_comes_in_powers_of_two(size: int, pinned: int) -> None:
    assert pinned_bytes(size) == pinned


def test_hidden_states_are_counted_on_the_host_and_no_more_on_the_device(tmp_path: Path) -> None:
    """80 x 4096 x 8192 x 2 bytes are 5 GiB."""
    stated = "train.tokens_per_device=4096"
    kept, moved = (
        make_plan(config_of(tmp_path, stated, f"train.gradient_checkpointing={way}"), machine_of_size(80), None).here.memory
        for way in ("true", "offload")
    )
    hidden = LAYERS * 4096 * HIDDEN * 2
    assert (kept.host, moved.host) == (0, hidden) == (0, 5 * GIB)
    assert kept.parts["activations"] - moved.parts["activations"] == hidden
    others = kept.parts.keys() - {"activations", "reserve"}
    assert {name: kept.parts[name] for name in others} == {name: moved.parts[name] for name in others}
    assert kept.total - moved.total >= hidden


@pytest.mark.parametrize(("size", "chosen", "fits"), [(40, True, False), (48, "offload", True), (80, True, True)])
def test_auto_offloads_where_nothing_else_fits(size: int, chosen: bool | str, fits: bool, tmp_path: Path) -> None:
    """70B at rank 64 and 4,096 tokens: with 48 GB it is that or nothing; with 40 GB not even that helps."""
    here = make_plan(config_of(tmp_path), machine_of_size(size), None).here
    choice = here.resolved.gradient_checkpointing
    assert (choice.value, here.fits) == (chosen, fits)
    assert ("offload, 5.0 GiB of host memory; 47 GiB hold one example in no other way" in choice.reason) == (chosen == "offload")
    assert here.setting.offload == (chosen == "offload")
    assert here.as_dict()["host_bytes"] == here.memory.host == (5 * GIB if chosen == "offload" else 0)


def test_training_decides_as_the_plan_does_where_examples_are_as_long_as_they_may_be(tmp_path: Path) -> None:
    machine = machine_of_size(48)
    assert resolve(config_of(tmp_path), machine).gradient_checkpointing.value == "offload"
    assert make_plan(config_of(tmp_path), machine, SHORT).here.resolved.gradient_checkpointing.value is True, (
        "short examples fit as they are"
    )


def test_a_stated_micro_batch_is_offloaded_for(tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.tokens_per_device=16384", "train.batch_size=64")
    assert resolve(config, machine_of_size(80)).gradient_checkpointing.value is True
    larger = config_of(tmp_path, "train.tokens_per_device=24576", "train.batch_size=64")
    choice = resolve(larger, machine_of_size(80)).gradient_checkpointing
    assert choice.value == "offload"
    assert "hold a micro-batch in no other way" in choice.reason


def test_compiled_blocks_are_not_offloaded(tmp_path: Path) -> None:
    assert resolve(config_of(tmp_path, "train.compile=true"), machine_of_size(48)).gradient_checkpointing.value is True


@pytest.mark.parametrize("model", ["somebody/unknown-9b", "./nowhere"])
def test_a_model_of_unknown_shape_is_not_offloaded(model: str, tmp_path: Path) -> None:
    assert resolve(config_of(tmp_path, f"model.id={model}"), machine_of_size(24)).gradient_checkpointing.value is True


def test_it_is_refused_without_a_gpu_and_a_finished_run_is_not(tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.gradient_checkpointing=offload")
    with pytest.raises(HardwareError, match="there is no GPU here") as caught:
        make_plan(config, CPU, None)
    assert caught.value.problems[0].where == "train.gradient_checkpointing"
    assert "--gpu" in caught.value.problems[0].fix
    # who evaluates or merges such a run on another machine asks what was decided, and moves nothing
    assert resolve(config, CPU).gradient_checkpointing.value == "offload"


def test_it_is_proposed_before_states_are_rounded(tmp_path: Path) -> None:
    stated = ("train.gradient_checkpointing=true", "train.tokens_per_device=4096")
    plan = make_plan(config_of(tmp_path, *stated, "tuning.rank=32"), machine_of_size(48), None)
    assert plan.change is not None
    assert plan.change.overrides == ("train.gradient_checkpointing=offload",)
    assert plan.change.memory.host == 5 * GIB
    told = plan.as_dict()["change"]
    assert told["host_bytes"] == 5 * GIB
