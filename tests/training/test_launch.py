"""Starting workers: what other launchers say, which worker speaks, and whose failure counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import api
from finetune.cli import workers
from finetune.errors import ConfigError, DataError, DivergedError, FinetuneError, HardwareError, RunInterruptedError, WorkerLostError
from finetune.hardware import STARTED_HERE, adopt_srun, crowd_size
from finetune.training.distributed import explained, idle_rounds, idle_scores, require_own_launch, require_shared
from finetune.training.launch import _first_failure, _verdict, launch

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", STARTED_HERE)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that this module sets, or that surrounds it, stays."""
    for name in (*LAUNCHERS, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def test_srun_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    adopt_srun()
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert found == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu03"}
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 40000
    assert crowd_size() == (8, 4)
    assert launch(["train", "x.yaml"], None) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-06,09],big1", "gpu03"),
        ("gpu[7,9-10]", "gpu7"),
        ("node-a,node-b", "node-a"),
        ("rack2-n[001-128]-ib", "rack2-n001-ib"),
        ("", "127.0.0.1"),
    ],
)
def test_the_first_host_of_a_step_is_found(monkeypatch: pytest.MonkeyPatch, nodes: str, host: str) -> None:
    for name, value in (SRUN | {"SLURM_STEP_NODELIST": nodes}).items():
        monkeypatch.setenv(name, value)
    adopt_srun()
    assert os.environ["MASTER_ADDR"] == host


@pytest.mark.parametrize(
    "surroundings",
    [
        {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_NTASKS": "8"},  # the batch script itself
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # one task, as `srun --pty bash` has
        SRUN | {"RANK": "0"},  # torchrun within srun
    ],
    ids=["batch script", "one task", "torchrun"],
)
def test_srun_is_left_alone_where_it_starts_no_workers(monkeypatch: pytest.MonkeyPatch, surroundings: dict[str, str]) -> None:
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    adopt_srun()
    assert "WORLD_SIZE" not in os.environ


def test_another_number_of_devices_than_the_launcher_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch(["train"], 4) is None
    with pytest.raises(ConfigError, match="started 4 processes"):
        launch(["train"], 2)
    monkeypatch.setenv(STARTED_HERE, "4")
    assert launch(["train"], 4) is None


def test_one_device_needs_no_workers() -> None:
    assert launch(["train"], 1) is None


@dataclass
class Failure:
    exitcode: int
    timestamp: int


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ({0: (-15, 10), 1: (5, 10)}, 5),  # ended because of the other, in the same second
        ({0: (4, 9), 1: (5, 10)}, 5),  # lost it, and was noticed first
        ({0: (4, 10), 1: (-15, 10)}, 4),  # memory, its own
        ({0: (4, 10), 1: (-9, 10)}, -9),  # killed, and missed by the other
        ({0: (-15, 10), 1: (-15, 11)}, -15),
        ({0: (3, 10), 1: (2, 9)}, 2),
    ],
)
def test_the_worker_that_failed_by_itself_decides(failures: dict[int, tuple[int, int]], code: int) -> None:
    assert _first_failure({rank: Failure(*failure) for rank, failure in failures.items()})[1] == code


def test_a_worker_that_was_killed_is_spoken_for() -> None:
    assert _verdict(1, 5) == 5
    with pytest.raises(HardwareError, match="worker 1 was ended from outside by SIGKILL"):
        _verdict(1, -signal.SIGKILL)


@pytest.mark.parametrize(
    ("error", "rank", "waits", "tells"),
    [
        (ConfigError("x"), "0", 0, True),
        (ConfigError("x"), "1", 1, True),  # after the wait: nobody else has said it
        (DataError("x"), "1", 1, True),
        (DivergedError("x"), "1", 1, True),
        (HardwareError("x"), "1", 0, True),
        (WorkerLostError("x"), "0", 1, True),
        (RunInterruptedError("x", signal_number=15), "0", 0, True),
        (RunInterruptedError("x", signal_number=15), "1", 0, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_one_worker_speaks_for_all(monkeypatch: pytest.MonkeyPatch, error: FinetuneError, rank: str, waits: int, tells: bool) -> None:
    waited: list[float] = []
    monkeypatch.setattr(workers.time, "sleep", waited.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("RANK", rank)
    assert workers.is_mine_to_tell(error) == tells
    assert len(waited) == waits


@pytest.mark.parametrize("started_here", [True, False])
def test_a_worker_that_is_being_ended_leaves_the_reason_to_its_own_launcher(monkeypatch: pytest.MonkeyPatch, started_here: bool) -> None:
    """torchrun and srun say no more than that something ended."""
    error = WorkerLostError("x")
    error.told_to_stop = True
    monkeypatch.setattr(workers.time, "sleep", lambda _: pytest.fail("there is nothing to wait for"))
    if started_here:
        monkeypatch.setenv(STARTED_HERE, "2")
    assert workers.is_mine_to_tell(error) != started_here


@pytest.mark.parametrize(("gpus", "most", "found"), [(0, os.cpu_count() or 1, "no GPU"), (1, 1, "1 GPUs")])
def test_more_processes_than_the_machine_has_devices_are_not_started(
    monkeypatch: pytest.MonkeyPatch, gpus: int, most: int, found: str
) -> None:
    """A hundred processes, each with a model, take a machine's memory before the first of them can say anything."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(HardwareError, match=f"{found}.*") as caught:
        launch(["train", "run.yaml"], most + 97)
    assert caught.value.problems[0].fix == f"use --devices {most}"


def test_accelerates_own_sharding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_own_launch()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="strategy: fsdp"):
        require_own_launch()


def test_accelerate_launch_on_a_cpu_starts_one_process_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --cpu --num_processes 2` leaves: an address to meet at, and nobody to meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "127.0.0.1" if name == "MASTER_ADDR" else "29500")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(ConfigError, match="--devices"):
        require_own_launch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_own_launch()


def test_a_run_directory_that_nodes_do_not_share_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all nodes share"):
        require_shared(tmp_path / "environment.json")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_a_lost_worker_is_told_from_other_errors(error: RuntimeError, lost: bool) -> None:
    with pytest.raises(WorkerLostError if lost else RuntimeError) as caught, explained():
        raise error
    assert isinstance(caught.value, WorkerLostError) == lost


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("pieces", [1, 2, 5, 6])
def test_every_device_runs_as_many_passes(world: int, pieces: int) -> None:
    cut = [[number] for number in range(pieces)]
    own = [len(cut[rank::world]) for rank in range(world)]
    assert {own[rank] + idle_rounds(cut, rank, world) for rank in range(world)} == {max(own)}
    lengths = [7 + number for number in range(pieces)]
    assert min(idle_scores(lengths, 8, rank, world, packed=False) for rank in range(world)) == 0


# --- as a user starts it -------------------------------------------------------------------------------------------------------------

BREAKS = """
import os
if os.environ.get("RANK") == "1":
    from finetune.errors import HardwareError
    from finetune.training import loop

    def fit(*_):
        {}

    loop.fit = fit
"""
FAILS = 'raise HardwareError("the second worker has no memory left", where="here", fix="buy some")'
DIES = "os.kill(os.getpid(), 9)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [(FAILS, "the second worker has no memory left"), (DIES, "worker 1 was ended from outside by SIGKILL")],
    ids=["fails", "dies"],
)
def test_the_failure_of_one_worker_ends_all_with_its_message(
    finetune: Callable[..., Any], write_config: Callable[..., Path], tmp_path: Path, what: str, said: str
):
    """The first worker sits in a sum over devices when the second ends; it says nothing, and nobody waits for it."""
    (tmp_path / "sitecustomize.py").write_text(BREAKS.format(what))
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = finetune("train", write_config(), "--devices", "2", PYTHONPATH=paths)
    assert done.code == 4
    assert done.err.count("error:") == 1, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(commands: list[list[str]], environments: list[dict[str, str]]) -> list[tuple[int, str, str]]:
    """All of ``commands`` at once; (exit code, stdout, stderr) of each."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    running = [
        subprocess.Popen([sys.executable, "-m", *command], env=common | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command, own in zip(commands, environments, strict=True)
    ]
    outputs = [process.communicate(timeout=500) for process in running]
    return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


def losses(run: Path, *keys: str) -> list[float]:
    import json

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in keys or ("loss", "validation_loss") if key in row]


@pytest.mark.slow
@pytest.mark.parametrize("model", [None, pytest.param("builtin:smollm2-135m", marks=pytest.mark.real)], ids=["tiny", "real"])
@pytest.mark.usefixtures("measured_here")
def test_two_nodes_of_torchrun_train_as_one_process(
    write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path, model: str | None
):
    """Two steps on two nodes, a third on one process, merged."""
    settings: dict[str, Any] = {"schedule": {"method": "constant", "warmup_steps": 0}}  # so that a longer run has the same rates
    if model:
        settings |= {"model": {"id": model}, "optimizer": {"learning_rate": 0.001}}
    reference = train_here(write_config("one.yaml", output=str(tmp_path / "one"), **settings), "train.max_steps=3")
    config = write_config("two.yaml", output=str(tmp_path / "two"), distributed={"strategy": "fsdp"}, **settings)
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    train = ["-m", "finetune", "train", str(config), "-o", "train.max_steps=2"]
    commands = [["torch.distributed.run", *nodes, "--node-rank", rank, *train] for rank in "01"]
    (code, out, err), (other_code, other_out, other_err) = start(commands, [{}, {}])
    assert (code, other_code) == (0, 0), err + other_err
    assert (out, other_out) == (f"{tmp_path / 'two'}\n", "")
    assert "strategy: fsdp (stated in distributed.strategy)" in " ".join(err.split())
    assert "step" not in other_err
    assert train_here(config, "train.max_steps=3", resume=True) == tmp_path / "two"
    assert losses(tmp_path / "two", "loss") == pytest.approx(losses(reference, "loss"), rel=1e-4)
    api.merge(tmp_path / "two", tmp_path / "merged", dtype="fp32")


@pytest.mark.slow
def test_tasks_of_srun_train_as_one_process(write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path):
    """As SLURM starts them on two nodes: no launcher, only its variables."""
    reference = train_here(write_config("one.yaml", output=str(tmp_path / "one")))
    config = write_config("two.yaml", output=str(tmp_path / "two"))
    step = SRUN | {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_LOCALID": "0",
    }
    tasks = [step | {"SLURM_PROCID": rank, "SLURM_JOB_ID": str(os.getpid())} for rank in "01"]
    (code, out, err), (other_code, other_out, other_err) = start([["finetune", "train", str(config)]] * 2, tasks)
    assert (code, other_code) == (0, 0), err + other_err
    assert (out, other_out) == (f"{tmp_path / 'two'}\n", "")
    assert "step" not in other_err
    assert losses(tmp_path / "two") == pytest.approx(losses(reference), rel=1e-5)


@pytest.mark.slow
def test_accelerate_launch_starts_the_workers_too(write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path):
    """`--multi_gpu` starts processes whatever the machine has; each finds that there is no GPU."""
    reference = train_here(write_config("one.yaml", output=str(tmp_path / "one")))
    config = write_config("two.yaml", output=str(tmp_path / "two"))
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--main_process_port", str(free_port())]
    command = ["accelerate.commands.launch", *options, "-m", "finetune", "train", str(config)]
    ((code, out, err),) = start([command], [{}])
    assert code == 0, err
    assert out == f"{tmp_path / 'two'}\n"
    assert "2 x cpu" in err
    assert losses(tmp_path / "two") == pytest.approx(losses(reference), rel=1e-5)
