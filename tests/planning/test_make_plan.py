"""A whole plan: every shipped file is planned offline, figures follow from each other, and only what cannot fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.errors import ConfigError, HardwareError
from finetune.hardware import Machine
from finetune.planning.gpus import BY_SIZE, GPUS
from finetune.planning.length import DataCounts, length_of
from finetune.planning.placement import MOST_TOKENS, machine_of, machine_of_size
from finetune.planning.plan import Plan, make_plan, options_of, refuse_hopeless
from finetune.planning.strategy import Crowd
from finetune.planning.throughput import stated_speed

ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "recipes").glob("*.yaml"))]
CPU = Machine("cpu", "a CPU", 2, 24 * 2**30, bf16=True)
PREPARED = DataCounts(rows=1000, validation_rows=20, origin="prepared", exact=True, tokens=200_000, supervised=50_000, longest=400)
COUNTED = DataCounts(rows=1000, validation_rows=20, origin="lines", exact=False)


def config_of(folder: Path, *overrides: str, model: str = "meta-llama/Meta-Llama-3-8B", **sections: object) -> Config:
    path = folder / "run.yaml"
    tuning = {"method": "lora", "rank": 16}
    found: dict[str, object] = {"model": {"id": model}, "tuning": tuning, "data": {"train": [{"source": "a.jsonl"}]}, "output": "out"}
    path.write_text(json.dumps(found | sections))
    return load_config(path, overrides).config


def shipped(path: Path, folder: Path) -> Config:
    if path.parent.name == "configs":
        return load_config(path).config
    run = folder / "run.yaml"
    model = {"id": "Qwen/Qwen2.5-7B-Instruct"}
    run.write_text(json.dumps({"extends": str(path), "model": model, "data": {"train": [{"source": "a.jsonl"}]}, "output": "out"}))
    return load_config(run).config


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_file_is_planned_without_network_weights_or_data(path: Path, tmp_path: Path) -> None:
    config = shipped(path, tmp_path)
    for machine in (CPU, machine_of_size(24), machine_of_size(141)):
        plan = make_plan(config, machine, None)
        told = json.loads(json.dumps(plan.as_dict()))
        assert sum(told["parameters"]["by_group"].values()) == told["parameters"]["trainable"] > 0
        assert sum(told["memory_bytes_by_part"].values()) == told["device"]["needs_bytes"]
        assert [gpu["gpu"]["name"] for gpu in told["gpus"]] == [gpu.name for gpu in GPUS]
        assert told["length"] is None
        check_consistent(plan)


def check_consistent(plan: Plan) -> None:
    """What must hold of any plan."""
    for placement in (plan.here, *(candidate.placement for candidate in plan.candidates)):
        assert placement.floor.total <= placement.memory.total
        assert not (placement.fits and placement.is_hopeless()), placement.machine.name
    fitting = [candidate.placement.fits for candidate in plan.candidates]
    assert (plan.candidate_change is None) or not any(fitting)
    if plan.here.fits:
        assert plan.change is None


# --- the examples of the mission -----------------------------------------------------------------------------------------------------


def test_llama_2_7b_with_rank_16_on_attention(tmp_path: Path) -> None:
    config = config_of(tmp_path, "tuning.targets=attention", model="meta-llama/Llama-2-7b-hf")
    plan = make_plan(config, CPU, None)
    assert plan.parameters.trainable == 16_777_216
    assert plan.shape.total == 6_738_415_616


def test_70b_in_nf4_fits_on_48_gb(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        "train.tokens_per_device=512",
        "train.gradient_checkpointing=true",
        "data.max_tokens=512",
        "optimizer.method=paged-adamw-8bit",
        "quantization.method=nf4",
        model="meta-llama/Meta-Llama-3-70B",
    )
    plan = make_plan(config, machine_of_size(48), None)
    assert plan.here.fits
    assert not make_plan(config, machine_of_size(40), None).here.fits
    plain = config.model_copy(update={"quantization": config_of(tmp_path).quantization})
    assert make_plan(plain, machine_of_size(48), None).here.is_hopeless()


# --- length, time, energy ------------------------------------------------------------------------------------------------------------


def test_steps_and_tokens_of_prepared_data(tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.batch_size=64", "train.epochs=3")
    length = length_of(config, PREPARED)
    assert (length.steps.per_epoch, length.steps.total) == (16, 48)
    assert length.tokens == 600_000
    assert length.supervised_share == 0.25
    # 20 steps: one epoch of 16, and 4 x 64 = 256 of 1,000 rows
    assert length_of(config_of(tmp_path, "train.batch_size=64", "train.epochs=3", "train.max_steps=20"), PREPARED).tokens == 251_200


def test_counted_rows_give_steps_and_no_tokens(tmp_path: Path) -> None:
    plan = make_plan(config_of(tmp_path), CPU, COUNTED, speed=stated_speed(100))
    assert plan.length is not None
    assert plan.length.steps.total == 32
    assert (plan.length.tokens, plan.length.supervised_share, plan.cost) == (None, None, None)


def test_time_and_energy_follow_from_the_speed(tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.epochs=2")
    on_cpu = make_plan(config, CPU, PREPARED, speed=stated_speed(100))
    assert on_cpu.cost is not None
    assert (on_cpu.cost.seconds, on_cpu.cost.kilowatt_hours) == (4000, None)
    two = make_plan(config, machine_of_size(80, 2), PREPARED, speed=stated_speed(1000), crowd=Crowd(world=2, on_this_machine=2))
    assert two.cost is not None
    assert two.cost.seconds == 400
    assert two.cost.kilowatt_hours == pytest.approx(2 * 700 * 400 / 3.6e6)


def test_a_gpu_is_known_by_what_its_driver_calls_it(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for called, name in (
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ):
        plan = make_plan(config, Machine("cuda", called, 1, 79 * 2**30, bf16=True), PREPARED)
        assert plan.speed is not None, called
        assert name in plan.speed.reason
        assert plan.speed.origin == "estimated"
    for called in (
        "a GPU of nobody",
        "NVIDIA RTX A4000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H200 NVL",
    ):
        assert make_plan(config, Machine("cuda", called, 1, 79 * 2**30, bf16=True), PREPARED).speed is None, called
    assert make_plan(config, CPU, PREPARED).speed is None


# --- micro-batches -------------------------------------------------------------------------------------------------------------------


def test_an_open_micro_batch_is_the_largest_that_fits(tmp_path: Path) -> None:
    open_config = config_of(tmp_path, "data.max_tokens=2048", model="meta-llama/Llama-2-13b-hf")
    plans = {size: make_plan(open_config, machine_of_size(size), None).here for size in (32, 40, 80)}
    tokens = [plan.setting.tokens for plan in plans.values()]
    assert 2048 <= tokens[0] < tokens[1] < tokens[2] <= MOST_TOKENS
    for size, plan in plans.items():
        assert plan.memory.total <= plan.machine.memory_bytes
        if plan.setting.tokens < MOST_TOKENS:
            more = f"train.tokens_per_device={plan.setting.tokens + 256}"
            kept = "train.gradient_checkpointing=true"  # else a stated micro-batch has its hidden states on the host
            larger = config_of(tmp_path, "data.max_tokens=2048", more, kept, model="meta-llama/Llama-2-13b-hf")
            assert make_plan(larger, machine_of_size(size), None).here.memory.total > plan.machine.memory_bytes


def test_an_open_micro_batch_has_the_reason_of_what_bounds_it(tmp_path: Path) -> None:
    """As training measures it, for whatever batch; memory is that of what a whole batch fills of it."""
    large, small = "model.id=meta-llama/Llama-2-13b-hf", "model.id=meta-llama/Llama-3.2-1B"
    found = {
        model: make_plan(config_of(tmp_path, model, "train.batch_size=4"), machine_of_size(40), PREPARED).here for model in (large, small)
    }
    assert found[large].resolved.tokens_per_device.reason.startswith("about what 39 GiB hold;")
    assert found[small].resolved.tokens_per_device.reason.startswith("more is no faster;")
    assert found[small].limit == MOST_TOKENS > found[large].limit > 4 * 400
    assert {here.setting.tokens for here in found.values()} == {4 * 400}


def test_no_micro_batch_exceeds_the_batch_or_cuts_an_example(tmp_path: Path) -> None:
    stated = config_of(tmp_path, "train.tokens_per_device=16384", "train.batch_size=2")
    assert make_plan(stated, CPU, PREPARED).here.setting.tokens == 2 * 400
    small = config_of(tmp_path, "train.tokens_per_device=64")
    assert make_plan(small, CPU, PREPARED).here.setting.tokens == 400


def test_what_a_run_decided_is_kept(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    first = make_plan(config, machine_of_size(80), PREPARED).here.resolved
    kept = replace(first, tokens_per_device=replace(first.tokens_per_device, value=1234))
    plan = make_plan(config, machine_of_size(80), PREPARED, resolved=kept)
    assert plan.here.setting.tokens == 1234
    assert plan.candidates[0].placement.setting.tokens != 1234


# --- what does not fit ---------------------------------------------------------------------------------------------------------------


def test_what_cannot_fit_is_refused_with_options_that_help(tmp_path: Path) -> None:
    config = config_of(tmp_path, model="meta-llama/Meta-Llama-3-70B")
    plan = make_plan(config, machine_of_size(80), None)
    with pytest.raises(HardwareError) as error:
        refuse_hopeless(plan)
    assert error.value.exit_code == 4
    assert "cannot fit" in str(error.value)
    assert plan.change is not None
    assert options_of(plan.change, plan.here) in error.value.problems[0].fix
    changed = load_config(tmp_path / "run.yaml", plan.change.overrides).config
    crowd = Crowd(world=plan.change.devices, on_this_machine=plan.change.devices)
    assert make_plan(changed, machine_of_size(80, plan.change.devices), None, crowd=crowd).here.fits


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_spreading_the_base_states_the_micro_batch_that_was_measured_before(strategy: str, tmp_path: Path) -> None:
    """Over several devices `auto` is 8192 tokens by rule, which may be more than what the change was found to hold."""
    model, quantization = "meta-llama/Llama-2-70b-hf", {"method": "fp4"}
    others = (f"distributed.strategy={strategy}", "tuning.dropout=0.1", "optimizer.method=paged-adamw-8bit")
    plan = make_plan(config_of(tmp_path, *others, model=model, quantization=quantization), machine_of_size(24), PREPARED)
    assert plan.change is not None
    overrides = plan.change.overrides
    assert overrides == ("distributed.strategy=fsdp", f"train.tokens_per_device={PREPARED.longest}")
    spread = config_of(tmp_path, *overrides, *others[1:], model=model, quantization=quantization)
    crowd = Crowd(world=plan.change.devices, on_this_machine=plan.change.devices)
    again = make_plan(spread, machine_of_size(24, plan.change.devices), PREPARED, crowd=crowd)
    assert again.here.fits
    assert again.here.memory.parts == plan.change.memory.parts


def test_what_nothing_helps_is_refused_with_another_device_as_the_fix(tmp_path: Path) -> None:
    config = config_of(tmp_path, model="meta-llama/Meta-Llama-3-70B")
    little = Machine("cuda", "a small GPU", 1, 2 * 2**30, bf16=True)
    plan = make_plan(config, little, None)
    with pytest.raises(HardwareError, match=r"larger device|-o "):
        refuse_hopeless(plan)


def test_what_may_fit_is_never_refused(tmp_path: Path) -> None:
    """Between the floor and the estimate lies what an estimate may have wrong: the run is tried."""
    config = config_of(tmp_path, "quantization.method=nf4")
    plan = make_plan(config, machine_of_size(24), None)
    between = (plan.here.floor.total + plan.here.memory.total) // 2
    tight = make_plan(config, Machine("cuda", "a GPU", 1, between, bf16=True), None)
    refuse_hopeless(tight)
    swapping = make_plan(config_of(tmp_path, model="meta-llama/Llama-2-13b-hf"), Machine("cpu", "a CPU", 2, 8 * 2**30, bf16=True), None)
    with pytest.raises(HardwareError):
        refuse_hopeless(swapping)
    refuse_hopeless(swapping, swap_bytes=64 * 2**30)


def test_processes_on_a_cpu_share_its_memory(tmp_path: Path) -> None:
    config = config_of(tmp_path, "distributed.strategy=ddp", model="HuggingFaceTB/SmolLM2-1.7B")
    alone = make_plan(config, CPU, None).here
    four = make_plan(config, CPU, None, crowd=Crowd(world=4, on_this_machine=4)).here
    assert four.needs == 4 * four.memory.total > alone.needs
    assert alone.fits
    assert not four.fits
    base = four.floor.parts["base"] + four.floor.parts["embeddings"]
    assert four.least == 4 * alone.least - 3 * base, "what is mapped from the model's file is there once, and no reason to refuse"
    over_nodes = make_plan(config, CPU, None, crowd=Crowd(world=4, on_this_machine=1)).here
    assert over_nodes.needs == over_nodes.memory.total


def test_only_listed_sizes_of_gpus_are_known() -> None:
    assert {machine_of_size(size).name for size in BY_SIZE} == set(BY_SIZE.values())
    with pytest.raises(ConfigError, match="no common GPU has 23 GB") as error:
        machine_of_size(23)
    assert "24" in error.value.problems[0].fix
    assert machine_of(GPUS[0], 3).devices == 3
