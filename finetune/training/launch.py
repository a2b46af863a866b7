"""One worker process a device, through torch's elastic launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from finetune.errors import HardwareError


def launch(arguments: Sequence[str], devices: int | None) -> int | None:
    """Run ``finetune ARGUMENTS`` once a device and wait; returns the first failure's exit code, or 0.

    Returns None where this process should do the work itself: it was launched already (torchrun, accelerate launch, SLURM), or one device
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
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="finetune", max_restarts=0
    )
    try:
        elastic_launch(config, sys.executable)("-m", "finetune", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
