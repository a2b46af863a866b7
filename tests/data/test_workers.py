"""Several processes: order, deaths, stalls."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.data import workers
from finetune.data.workers import in_order
from finetune.errors import HardwareError


def test_one_process_works_lazily() -> None:
    taken: list[int] = []
    results = in_order(math.sqrt, (taken.append(number) or number for number in range(100)), 1)
    assert next(results) == 0.0
    assert taken == [0]


def test_results_come_in_the_order_of_the_items() -> None:
    assert list(in_order(math.factorial, [2000, 1, 1500, 2, 3, 4, 5], 2)) == [math.factorial(n) for n in (2000, 1, 1500, 2, 3, 4, 5)]


def test_small_data_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: pytest.fail("no process is worth its start here"))
    with pytest.raises(pytest.fail.Exception):  # asked for only after the first SMALL items
        list(in_order(abs, range(workers.SMALL + 1)))
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda _: pytest.fail("a process was started"))
    assert list(in_order(abs, range(workers.SMALL))) == list(range(workers.SMALL))


def test_b10_a_stall_times_out_and_leaves_no_process() -> None:
    before = time.perf_counter()
    with pytest.raises(HardwareError, match="gave no answer for 2 seconds") as caught:
        list(in_order(time.sleep, [300.0, 300.0, 300.0], 2, stall_s=2.0))
    assert "data.processes: 1" in caught.value.problems[0].fix
    assert time.perf_counter() - before < 30
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_b10_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(HardwareError, match="died"):
        list(in_order(os._exit, [3, 3], 2))


def test_what_the_work_raises_passes_through() -> None:
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        list(in_order(math.sqrt, [4.0, -1.0], 2))


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time, multiprocessing, os, signal, threading\n"
        "from finetune.data.workers import in_order\n"
        "def later():\n"
        "    while not multiprocessing.active_children(): time.sleep(0.05)\n"
        "    time.sleep(1)\n"
        "    print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    threading.Thread(target=later).start()\n"
        "    list(in_order(time.sleep, [60.0] * 4, 2))\n"
    )
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False).stdout
    children = [int(number) for number in out.split()]
    assert children
    deadline = time.monotonic() + 10
    while any(_alive(number) for number in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(number) for number in children)


def _alive(number: int) -> bool:
    status = Path(f"/proc/{number}/stat")
    return status.is_file() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
