"""The smallest change: it fits, nothing cheaper does, and the command line takes it as it is given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.hardware import Machine
from finetune.planning.fit import MARGIN, Change, Device, fits, fits_with_room, smallest_change
from finetune.planning.gpus import BY_SIZE, GPUS, gpu_of
from finetune.planning.lookup import find_shape
from finetune.planning.memory import Memory, Setting, estimate_memory, setting_of
from finetune.planning.parameters import count_parameters
from finetune.planning.resolve import resolve

GIB = 2**30


def write(folder: Path, **sections: Any) -> Path:
    settings: dict[str, Any] = {
        "model": {"id": "meta-llama/Meta-Llama-3-8B"},
        "tuning": {"method": "lora", "rank": 16, "alpha": 16},
        "data": {"train": [{"source": "rows.jsonl"}], "max_tokens": 2048},
        "train": {"precision": "bf16", "tokens_per_device": 8192, "gradient_checkpointing": False},
        "output": "out",
    }
    path = folder / "run.yaml"
    path.write_text(
        json.dumps(
            {
                name: settings.get(name, {}) | sections.get(name, {}) if isinstance(settings.get(name), dict) else value
                for name, value in (settings | sections).items()
            }
        )
    )
    return path


def decided(config: Config, **changes: Any) -> Setting:
    return replace(setting_of(resolve(config, Machine("cuda", "a GPU", 1, 80 * GIB, bf16=True)), "cuda", example_tokens=512), **changes)


def needed(config: Config, where: Setting) -> Memory:
    shape = find_shape(config.model)
    return estimate_memory(shape, count_parameters(shape, config), config, where)


def change_for(config: Config, gib: float, most: int = 1) -> Change | None:
    return smallest_change(find_shape(config.model), config, decided(config), Device(int(gib * GIB), most), config.data.max_tokens)


def test_what_fits_is_left_alone(tmp_path: Path) -> None:
    config = load_config(write(tmp_path)).config
    memory = needed(config, decided(config))
    assert fits(memory, memory.total)
    assert not fits(memory, memory.total - 1)
    assert change_for(config, memory.total / GIB + 0.01) is None


def test_states_that_spill_need_no_room() -> None:
    assert fits(Memory({"base": 10, "optimizer": 5}, spillable=5), 10)
    assert not fits(Memory({"base": 10, "optimizer": 5}), 10)


@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        (40, ["train.tokens_per_device=4096"]),
        (22, ["train.gradient_checkpointing=true"]),
        (12, ["train.gradient_checkpointing=true", "quantization.method=nf4"]),
    ],
    ids=["smaller", "again", "quantized"],
)
def test_the_cheapest_change_that_fits_is_proposed(gib: int, expected: list[str], tmp_path: Path) -> None:
    change = change_for(load_config(write(tmp_path)).config, gib)
    assert change is not None
    assert list(change.overrides) == expected
    assert (change.devices, len(change.costs)) == (1, len(expected))


@pytest.mark.parametrize(("gib", "most"), [(40, 1), (30, 1), (22, 1), (16, 1), (12, 1), (10, 8), (5, 8)])
def test_the_command_line_takes_the_change_and_each_part_is_needed(gib: float, most: int, tmp_path: Path) -> None:
    path = write(tmp_path)
    change = change_for(load_config(path).config, gib, most)
    assert change is not None

    def memory_with(overrides: tuple[str, ...]) -> Memory:
        changed = load_config(path, overrides).config
        strategy = "fsdp" if changed.distributed.strategy == "fsdp" else "ddp"
        return needed(changed, decided(changed, world=change.devices, strategy=strategy))

    assert memory_with(change.overrides).parts == change.memory.parts
    assert fits_with_room(change.memory, int(gib * GIB))
    for left_out in change.overrides:
        if not left_out.startswith(("tuning.alpha", "distributed.strategy")):  # which go with another
            assert not fits_with_room(memory_with(tuple(other for other in change.overrides if other != left_out)), int(gib * GIB))


def test_what_is_proposed_leaves_room(tmp_path: Path) -> None:
    config = load_config(write(tmp_path)).config
    halved = needed(config, decided(config, tokens=4096)).total
    close, roomy = change_for(config, halved * (1 + 0.5 * MARGIN) / GIB), change_for(config, halved * (1 + 1.5 * MARGIN) / GIB)
    assert roomy is not None
    assert close is not None
    assert roomy.overrides == ("train.tokens_per_device=4096",)
    assert close.overrides != roomy.overrides


def test_trained_weights_in_bf16_come_last(tmp_path: Path) -> None:
    """What takes time alone is tried before, and so are more devices; full tuning has much to gain from it."""
    settings = json.loads(write(tmp_path).read_text()) | {"tuning": {"method": "full"}}
    path = tmp_path / "full.yaml"
    path.write_text(json.dumps(settings))
    config = load_config(path).config
    for most in (1, 2):
        changes = {gib: change_for(config, gib, most) for gib in range(20, 200, 4)}
        narrow = {gib for gib, change in changes.items() if change and "train.trainable_dtype=bf16" in change.overrides}
        others = {gib for gib, change in changes.items() if change} - narrow
        assert narrow
        assert others
        assert max(narrow) < min(others)


def test_what_takes_time_alone_comes_before_a_smaller_rank(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, tuning={"rank": 64, "alpha": 64}, data={"max_tokens": 16})).config
    least = needed(config, decided(config, tokens=16, checkpointing=True, optimizer="paged-adamw-8bit"))
    change = change_for(config, least.firm * (1 + 1.5 * MARGIN) / GIB)
    assert change is not None
    assert not any(override.startswith(("tuning", "quantization")) for override in change.overrides)


def test_a_method_on_a_plain_base_is_not_quantized(tmp_path: Path) -> None:
    """PiSSA takes its start out of the base: the checks refuse it on 4 bits, so rank and devices are what is left."""
    path = write(tmp_path, tuning={"rank": 64, "alpha": 64, "init": {"method": "pissa"}})
    change = change_for(load_config(path).config, 20, most=4)
    assert change is not None
    assert not any(override.startswith("quantization") for override in change.overrides)


def test_where_nothing_helps_nothing_is_proposed(tmp_path: Path) -> None:
    assert change_for(load_config(write(tmp_path)).config, 1, most=1) is None


def test_the_table_of_gpus_is_ordered_and_complete() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gib, name in BY_SIZE.items():
        assert gpu_of(name).gib == pytest.approx(gib, rel=0.02)
    for gpu in GPUS:
        assert 0 < gpu.usable_bytes < gpu.gib * GIB
        assert gpu.source
