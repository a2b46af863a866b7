"""How long a step waited for its rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class InputClock:
    """Adds up what each thread and fork spends on reading rows; lanes of a step read at the same time."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Count the block for the thread that runs it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            thread = threading.get_ident()
            self._seconds[thread] = self._seconds.get(thread, 0.0) + time.perf_counter() - began

    def add(self, place: int, seconds: float) -> None:
        """Count what the fork at ``place`` spent."""
        fork = -1 - place  # threads have positive numbers
        self._seconds[fork] = self._seconds.get(fork, 0.0) + seconds

    def take(self) -> float:
        """Seconds of the thread or fork that read longest since the last call."""
        longest = max(self._seconds.values(), default=0.0)
        self._seconds.clear()
        return longest
