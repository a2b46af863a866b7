"""Signals (SIGINT, SIGTERM, SIGHUP, SLURM's SIGUSR1) as a request to stop: at once where nothing is lost, else after the current step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SAME_REQUEST_S = 1.0
"""A worker gets one Ctrl-C or scancel twice, from the terminal or scheduler and from its launcher: within this time they are one."""
_SHOW_CURSOR = "\x1b[?25h"

ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What asks a run to stop. SIGHUP comes when its terminal is closed or the connection to it is lost; SIGUSR1 is what
`sbatch --signal=USR1@120` sends ahead of a pre-emption or the end of the time limit."""


class Interruption(BaseException):
    """Raised by a signal wherever the work of the moment may be dropped; no library that retries or rewraps Exceptions swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        """SIGINT or SIGTERM."""


class StopRequest:
    """Whether, and by which signal, the run was asked to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        """SIGINT or SIGTERM; SIGHUP and SIGUSR1 count as SIGTERM."""
        self._asked_at = 0.0
        self._patient = False

    def __bool__(self) -> bool:
        return self.signal_number is not None

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """Inside the block a signal is only noted, for whoever looks; outside it is an `Interruption`."""
        self._patient = True
        try:
            self.check()  # a signal whose Interruption was lost in a destructor or callback, where Python drops what is raised
            yield
        finally:
            self._patient = False

    def check(self) -> None:
        """Interruption where a signal has come."""
        if self.signal_number is not None:
            raise Interruption(self.signal_number)

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal: the first is a request, the second ends the process at once."""
        del frame
        asked = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if not self:
            self.signal_number, self._asked_at = int(asked), time.monotonic()
            if not self._patient:
                raise Interruption(asked)
        elif "LOCAL_RANK" not in os.environ or time.monotonic() - self._asked_at > _SAME_REQUEST_S:
            _leave(asked)


def _leave(number: int) -> NoReturn:
    """End without any clean-up: what is sealed stays whole, and what was half-written has a temporary name that a resumed run removes."""
    terminal = sys.stderr.isatty()
    os.write(2, f"{_SHOW_CURSOR if terminal else ''}\nstopped at once by a second signal; the last checkpoint is intact\n".encode())
    os._exit(128 + number)


def stays_ignored(number: int) -> bool:
    """Whether ``number`` is the SIGHUP that nohup has had ignored, and that is to stay so."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn signals into a `StopRequest`. Outside the main thread they stay as they are."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in ASKED if not stays_ignored(number)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
