"""Preparation that takes longer than a process group waits (pitfall B4)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import InitProcessGroupKwargs

from finetune import api
from finetune.data import prepare
from finetune.training import train

read, accelerator = prepare.read_all, train.Accelerator


def slow_read(*arguments):
    assert not torch.distributed.is_initialized()
    time.sleep(12)
    return read(*arguments)


def impatient(**options):
    return accelerator(**options, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=8))])


prepare.read_all, train.Accelerator = slow_read, impatient
began = time.monotonic()
api.train(api.load_config(Path(sys.argv[1])).config)
print(torch.distributed.get_world_size(), time.monotonic() - began)
"""


@pytest.mark.slow
def test_b4_slow_preparation_times_out_no_process_group(write_config: Callable[..., Path], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    config = write_config(train={"epochs": 1, "batch_size": 8, "precision": "fp32", "max_steps": 2})
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment["FINETUNE_CACHE"] = str(tmp_path / "cache")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(config)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    took = []
    for process in ranks:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        world, seconds = out.split()[-2:]
        assert world == "2"
        took.append(float(seconds))
    assert max(took) > 12
    assert min(took) > 8, "the second process, which may begin later, waits longer than the group would"
