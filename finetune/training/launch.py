"""One worker process a device, through torch's elastic launcher, where no other launcher has started this process."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from finetune.errors import ConfigError, HardwareError, WorkerLostError
from finetune.hardware import STARTED_HERE

_STEP_SECONDS = 3600
"""How long a worker may take to finish its step and save once it was asked to stop: a step of a 70B model is long."""


def _patience() -> dict[str, Any]:
    """The launcher's time limit for a clean end, where this version of torch lets it be set; its own is 30 s."""
    known = {field.name for field in fields(LaunchConfig)}
    return {"shutdown_timeout": _STEP_SECONDS} if "shutdown_timeout" in known else {}


def launch(arguments: Sequence[str], devices: int | None) -> int | None:
    """Run ``finetune ARGUMENTS`` once a device and wait; returns the exit code of the worker that failed first, or 0.

    Returns None where this process should do the work itself: it was launched already (torchrun, accelerate launch, srun), or one device
    is wanted. ``devices`` None means all GPUs. Raises HardwareError where more GPUs are asked for than there are (more cores, where
    there is no GPU), or a worker was killed, ConfigError where another launcher has started another number of processes.
    """
    if "LOCAL_RANK" in os.environ:
        _require_agreement(devices)
        return None
    found = torch.cuda.device_count()
    if devices is not None and found and devices > found:
        raise HardwareError(
            f"{devices} devices are asked for, this machine has {found} GPUs", where="--devices", fix=f"use --devices {found}"
        )
    cores = os.cpu_count() or 1
    if devices is not None and not found and devices > cores:  # each is a process of its own, with a model of its own
        raise HardwareError(
            f"{devices} devices are asked for, this machine has no GPU and {cores} cores", where="--devices", fix=f"use --devices {cores}"
        )
    count = devices or max(found, 1)
    return None if count == 1 else _run(arguments, count)


def _require_agreement(devices: int | None) -> None:
    """That ``--devices`` says what the launcher did, where it was not the one above, which read it."""
    started = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    if devices not in (None, started) and STARTED_HERE not in os.environ:
        raise ConfigError(
            f"--devices {devices} is asked for, and the launcher has started {started} processes on this machine",
            where="--devices",
            fix="leave it out: torchrun, accelerate launch and srun say how many",
        )


def _run(arguments: Sequence[str], count: int) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ[STARTED_HERE] = str(count)
    # its own log repeats each failure without the reason, which the workers have already told
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="finetune",
        max_restarts=0,
        **_patience(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "finetune", *arguments)
    except ChildFailedError as error:
        return _verdict(*_first_failure(error.failures))
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        del os.environ[STARTED_HERE]
    return 0


def _first_failure(failures: Mapping[int, Any]) -> tuple[int, int]:
    """(worker, exit code or negative signal) of the one that failed by itself: the others only lost it, or were ended because of it."""
    codes: list[tuple[int, int]] = [(rank, one.exitcode) for rank, one in sorted(failures.items(), key=lambda item: item[1].timestamp)]
    followers = (WorkerLostError.exit_code, -signal.SIGTERM)
    return next((found for found in codes if found[1] not in followers), min(codes, key=lambda found: found[1] < 0))


def _verdict(worker: int, code: int) -> int:
    """The exit code of a worker that has said what was wrong; HardwareError for one that could not."""
    if code > 0:
        return code
    raise HardwareError(
        f"worker {worker} was ended from outside by {signal.Signals(-code).name}",
        where="finetune train",
        fix="SIGKILL mostly means that the machine's memory ran out: fewer --devices, or train.tokens_per_device; then --resume",
    )
