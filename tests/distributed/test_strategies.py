"""ddp and fsdp on two processes train what one process trains; what they save goes on with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune import api

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
on_two = pytest.mark.xdist_group("two-processes")  # their runs are made once, and not by every worker

HERE = Path(__file__).parent
TRAIN = {"epochs": 2, "batch_size": 8, "precision": "fp32", "tokens_per_device": 64, "checkpoint": {"every_steps": 2}}
NF4 = {"quantization": {"method": "nf4"}}
FSDP = {"distributed": {"strategy": "fsdp"}}
DDP = {"distributed": {"strategy": "ddp"}}


def run_pair(*arguments: object, processes: int = 2) -> None:
    """``pair.py`` in as many processes as asked, under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(HERE / "pair.py"), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def series(run: Path) -> dict[str, list[Any]]:
    """Each figure of metrics.jsonl over the steps."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: [row[key] for row in rows if key in row] for key in ("loss", "grad_norm", "validation_loss", "learning_rates", "tokens")}


def assert_same(run: Path, reference: Path, tolerance: float) -> None:
    wanted, got = series(reference), series(run)
    for key, values in wanted.items():
        assert got[key] == [pytest.approx(value, rel=tolerance) for value in values], key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def write(folder: Path, tiny_model_dir: Path, chat_file: Path) -> Callable[..., Path]:
    def write(name: str, **sections: Any) -> Path:
        config = {
            "model": {"id": str(tiny_model_dir)},
            "tuning": {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
            "optimizer": {"learning_rate": 0.01},
            "data": {"train": [{"source": str(chat_file)}], "validation": {"fraction": 0.3}, "max_tokens": 256},
            "train": TRAIN,
            "output": str(folder / name),
        }
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(config | sections))
        return path

    return write


@pytest.fixture(scope="module")
def one(write: Callable[..., Path], train_here: Callable[..., Path]) -> dict[str, Path]:
    """The same runs on one process."""
    return {"plain": train_here(write("one")), "nf4": train_here(write("one-nf4", **NF4))}


@pytest.fixture(scope="module")
def two(write: Callable[..., Path], folder: Path, tiny_model_dir: Path) -> Path:
    """Every run on two processes, in one start."""
    configs = {
        "ddp": write("ddp", **DDP),
        "fsdp": write("fsdp", **FSDP),
        "nf4-ddp": write("nf4-ddp", **NF4, **DDP),
        "nf4-fsdp": write("nf4-fsdp", **NF4, **FSDP),
        "stopped": write("stopped", **FSDP),
    }
    (folder / "configs.json").write_text(json.dumps({name: str(path) for name, path in configs.items()}))
    run_pair(folder / "configs.json", tiny_model_dir, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [("ddp", "plain", 1e-5), ("fsdp", "plain", 1e-4), ("nf4-ddp", "nf4", 1e-5), ("nf4-fsdp", "nf4", 1e-4)],
)
@on_two
def test_a10_a17_two_processes_train_as_one(two: Path, one: dict[str, Path], name: str, reference: str, tolerance: float) -> None:
    """Losses, norms and rates of every step; micro-batches are so small that the processes have unequal numbers of them."""
    assert_same(two / name, one[reference], tolerance)


@pytest.mark.usefixtures("measured_here")
@on_two
def test_a_checkpoint_of_two_processes_goes_on_with_one_and_merges(
    two: Path, one: dict[str, Path], train_here: Callable[..., Path], folder: Path
) -> None:
    stopped = two / "stopped"
    assert not (stopped / "adapter").exists()
    assert train_here(folder / "stopped.yaml", resume=True) == stopped
    assert_same(stopped, one["plain"], 1e-4)
    wanted, got = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one["plain"], stopped))
    assert wanted.keys() == got.keys()
    for key, tensor in wanted.items():
        assert (got[key] - tensor).norm() <= 1e-3 * tensor.norm(), key
    api.merge(stopped, folder / "merged")
    assert (folder / "merged" / "model.safetensors").is_file()


@on_two
def test_b9_adapters_are_saved_whole(two: Path, one: dict[str, Path]) -> None:
    wanted, got = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one["plain"], two / "fsdp"))
    assert {key: tensor.shape for key, tensor in got.items()} == {key: tensor.shape for key, tensor in wanted.items()}
    assert all(tensor.any() for tensor in got.values())


@on_two
def test_a_spread_model_computes_what_the_whole_one_does(two: Path) -> None:
    """Every method: the same losses and gradients, and about half of the blocks on each process."""
    for rank in (0, 1):
        for case, found in json.loads((two / f"{rank}.json").read_text()).items():
            assert found["spread"] == pytest.approx(found["loss"], rel=1e-6), case
            assert found["gradients"] < 1e-5, case
            assert found["is spread"], case
            before, after = found["bytes"]
            assert after < before, case
    found = json.loads((two / "0.json").read_text())["lora"]["bytes"]
    blocks = 2 * 4 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)  # of the tiny model's matrices, in fp32
    assert found[0] - found[1] == pytest.approx(blocks / 2, rel=0.02)


@pytest.mark.real
@pytest.mark.usefixtures("measured_here")
def test_the_real_model_trains_alike_goes_on_with_one_process_and_merges(
    folder: Path, write: Callable[..., Path], train_here: Callable[..., Path]
) -> None:
    """SmolLM2-135M with LoRA: three steps of ddp and fsdp on two processes, one more on one process, against four steps of one process."""
    real = {
        "model": {"id": "builtin:smollm2-135m"},
        "optimizer": {"learning_rate": 0.001},
        "schedule": {"method": "constant", "warmup_steps": 0},  # so that a longer run has the same rates
    }

    def steps(count: int) -> dict[str, Any]:
        return {"train": TRAIN | {"max_steps": count, "batch_size": 4, "tokens_per_device": 64, "evaluate": {"every_steps": 4}}}

    reference = series(train_here(write("real-one", **real, **steps(4))))
    configs = {name: write(name, **real, **strategy, **steps(3)) for name, strategy in (("real-ddp", DDP), ("real-fsdp", FSDP))}
    (folder / "real.json").write_text(json.dumps({name: str(path) for name, path in configs.items()}))
    run_pair(folder / "real.json")
    for (name, path), tolerance in zip(configs.items(), (1e-5, 1e-4), strict=True):
        run = train_here(path, "train.max_steps=4", resume=True)
        assert series(run)["loss"] == pytest.approx(reference["loss"], rel=tolerance), name
        assert series(run)["validation_loss"][-1] == pytest.approx(reference["validation_loss"][-1], rel=tolerance), name
        api.merge(run, folder / f"merged-{name}", dtype="fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_nf4_spread_over_gpus(folder: Path, write: Callable[..., Path], train_here: Callable[..., Path], offload: bool) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}: FSDP's copies to the GPU and NCCL run nowhere else")
    settings = {**NF4, "train": TRAIN | {"precision": "bf16"}, "optimizer": {"learning_rate": 0.01, "method": "adamw"}}
    reference = train_here(write(f"gpu-one-{offload}", **settings))
    name = f"gpu-fsdp-{offload}"
    path = write(name, **settings, distributed={"strategy": "fsdp", "offload": offload})
    (folder / "gpu.json").write_text(json.dumps({name: str(path)}))
    run_pair(folder / "gpu.json")
    assert_same(folder / name, reference, 2e-2)
