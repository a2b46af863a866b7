"""One command, watched from outside: wall time, processor time, peak memory, and when each line of its output came."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INTERVAL_S = 0.05


Line = tuple[float, str]
"""Seconds since the start of the command, and a line of what it wrote."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a command took."""

    returncode: int
    wall_s: float
    cpu_s: float
    """User and system time of the command and all its children."""
    peak_mib: float
    """Most resident memory of the process and its children at one time, mapped files included."""
    load: float
    """Share of the machine's cores that other processes used meanwhile, 0 to 1."""
    lines: tuple[Line, ...] = field(repr=False)
    """Of stdout, or of the file that was watched."""
    errors: str = field(repr=False)
    """stderr."""


def run(
    command: Sequence[str | Path], environment: Mapping[str, str], directory: Path, timeout_s: float, watched: Path | None = None
) -> Measured:
    """Run ``command`` to its end; one that outlasts ``timeout_s`` is killed and has return code -9.

    ``watched`` is a file that the command appends to; its lines are timed instead of those on stdout, to within `INTERVAL_S`.
    """
    before, began = psutil.cpu_times(), time.perf_counter()
    errors = directory / "stderr.txt"
    with errors.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=file, text=True, env=dict(environment), cwd=directory)
    watch = _Watch(process.pid, began, watched)
    deadline = threading.Timer(timeout_s, process.kill)
    deadline.start()
    assert process.stdout is not None
    lines = tuple((time.perf_counter() - began, line.rstrip("\n")) for line in process.stdout)
    # wait4 instead of Popen.wait: it tells the processor time and the memory of this child and of the children it waited for
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall, after = time.perf_counter() - began, psutil.cpu_times()
    deadline.cancel()
    watch.stop()
    cpu = usage.ru_utime + usage.ru_stime
    busy = (after.user + after.system + after.nice) - (before.user + before.system + before.nice)
    return Measured(
        returncode=process.returncode,
        wall_s=wall,
        cpu_s=cpu,
        peak_mib=max(watch.peak / 2**20, usage.ru_maxrss / 1024),
        load=max(0.0, busy - cpu) / (wall * (os.cpu_count() or 1)),
        lines=tuple(watch.lines) if watched else lines,
        errors=errors.read_text(encoding="utf-8", errors="replace"),
    )


class _Watch:
    """Looks at a process tree and a file now and then, in a thread."""

    def __init__(self, process: int, began: float, file: Path | None) -> None:
        self.peak = 0
        """Bytes, highest so far."""
        self.lines: list[Line] = []
        self._process, self._began, self._file, self._read = process, began, file, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self.peak = max(self.peak, _resident(self._process))
            self._look()

    def _look(self) -> None:
        if self._file is None or not self._file.is_file():
            return
        with self._file.open(encoding="utf-8") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind("\n") + 1]
        self._read += len(whole.encode())
        self.lines += [(time.perf_counter() - self._began, line) for line in whole.splitlines()]

    def stop(self) -> None:
        """A last look at the file."""
        self._done.set()
        self._thread.join()
        self._look()


def _resident(process: int) -> int:
    """Bytes of a process and its children now; 0 for what has ended."""
    total = 0
    try:
        root = psutil.Process(process)
        for member in (root, *root.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total
