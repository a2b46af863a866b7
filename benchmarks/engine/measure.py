"""One command, watched from outside: wall time, processor time, peak memory, and when each line of its output came."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

INTERVAL_S, LISTING_S = 0.05, 0.5


class Line(NamedTuple):
    """A line that a command wrote."""

    at_s: float
    """Seconds since the command began."""
    cpu_s: float
    """Processor time that the command and its children had used by then."""
    text: str


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
        process = subprocess.Popen(  # a session of its own: a tool's children end with it
            [*map(str, command)],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=dict(environment),
            cwd=directory,
            start_new_session=True,
        )
    watch = _Watch(process.pid, began, watched)
    deadline = threading.Timer(timeout_s, _kill, [process.pid])
    deadline.start()
    assert process.stdout is not None
    try:
        lines = tuple(watch.line(text.rstrip("\n")) for text in process.stdout)
        # wait4 instead of Popen.wait: it tells the processor time and the memory of this child and of the children it waited for
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        _kill(process.pid)
        deadline.cancel()  # a timer that waits would keep this program
        raise
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


def _kill(session: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


class _Watch:
    """Looks at a process tree and a file now and then, in a thread."""

    def __init__(self, process: int, began: float, file: Path | None) -> None:
        self.peak = 0
        """Bytes, highest so far."""
        self.lines: list[Line] = []
        self._process, self._began, self._file, self._read = process, began, file, 0
        self._used, self._listed = 0.0, -LISTING_S
        self._tree: list[psutil.Process] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(INTERVAL_S):
            with suppress(psutil.NoSuchProcess):  # one of them has just ended
                self.peak = max(self.peak, sum(member.memory_info().rss for member in self._members()))
            self._look()

    def _look(self) -> None:
        if self._file is None or not self._file.is_file():
            return
        with self._file.open(encoding="utf-8") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind("\n") + 1]
        self._read += len(whole.encode())
        self.lines += [self.line(text) for text in whole.splitlines()]

    def line(self, text: str) -> Line:
        """``text`` with the time at which it is seen."""
        with suppress(psutil.NoSuchProcess):
            times = [member.cpu_times() for member in self._members()]
            used = sum(each.user + each.system + each.children_user + each.children_system for each in times)
            self._used = max(self._used, used)
        return Line(time.perf_counter() - self._began, self._used, text)

    def _members(self) -> list[psutil.Process]:
        """The process and its children, listed anew every `LISTING_S`: looking through all processes takes a while, and is measured too."""
        if time.perf_counter() - self._listed > LISTING_S:
            root = psutil.Process(self._process)
            self._tree, self._listed = [root, *root.children(recursive=True)], time.perf_counter()
        return [member for member in self._tree if member.is_running()]

    def stop(self) -> None:
        """A last look at the file."""
        self._done.set()
        self._thread.join()
        self._look()
