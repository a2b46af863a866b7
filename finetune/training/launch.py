"""One worker process a device, through torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from finetune.errors import HardwareError

_STEP_SECONDS = 3600
"""How long a worker may take to finish its step and save once it was asked to stop: a step of a 70B model is long."""


def _patience() -> dict[str, Any]:
    """The launcher's time limit for a clean end, where this version of torch lets it be set; its own is 30 s."""
    known = {field.name for field in fields(LaunchConfig)}
    return {"shutdown_timeout": _STEP_SECONDS} if "shutdown_timeout" in known else {}


def launch(arguments: Sequence[str], devices: int | None) -> int | None:
    """Run ``finetune ARGUMENTS`` once a device and wait; returns the first failure's exit code, or 0.

    Returns None where this process should do the work itself: it was launched already (torchrun, accelerate launch), or one device
    is wanted. ``devices`` None means all GPUs. Raises HardwareError where more GPUs are asked for than there are.
    """
    if "LOCAL_RANK" in os.environ:
        return None
    found = torch.cuda.device_count()
    if devices is not None and found and devices > found:
        raise HardwareError(
            f"{devices} devices are asked for, this machine has {found} GPUs", where="--devices", fix=f"use --devices {found}"
        )
    count = devices or max(found, 1)
    if count == 1:
        return None
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
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
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
