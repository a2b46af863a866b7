"""Lines that stay below everything that is printed, redrawn in their place.

Nothing of the terminal is switched: no cursor is hidden, no other screen is used. After each drawing the cursor stands at the start of the
line below, so that a process that is killed, by whatever, leaves a terminal that can be used as it is.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

_EVERY_S = 0.5
_OFF = ("", "0", "false")


def is_live(console: Console) -> bool:
    """Whether lines may be redrawn: in a terminal that moves its cursor, unless CI or NO_COLOR asks for plain text."""
    automatic = os.environ.get("CI", "").lower() not in _OFF
    return console.is_terminal and not console.is_dumb_terminal and not console.no_color and not automatic


class Pinned:
    """Draws what ``draw(width, height)`` gives, twice a second and after all that is printed through `print`.

    What this process writes to stdout or stderr in the meantime is printed above, a line at a time.
    """

    def __init__(self, console: Console, draw: Callable[[int, int], Sequence[Text]]) -> None:
        self._console, self._draw = console, draw
        self._stream = console.file
        self._lock = threading.RLock()
        self._widths: list[int] = []
        """Columns of each line that is on the screen."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_drawing, name="live view", daemon=True)
        self._streams = (sys.stdout, sys.stderr)

    def start(self) -> None:
        """Begin to draw."""
        self._streams = (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = (Lines(stream, self.write) if stream.isatty() else stream for stream in self._streams)
        self.refresh()
        self._thread.start()

    def stop(self) -> None:
        """Draw for the last time, and leave it on the screen."""
        self._ended.set()
        self._thread.join()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Lines):
                stream.finish()
        sys.stdout, sys.stderr = self._streams
        self.refresh()

    def print(self, *renderables: Any, **options: Any) -> None:
        """Print above, as rich's console does."""
        with self._lock, self._console.capture() as captured:
            self._console.print(*renderables, **options)
        self.write(captured.get())

    def write(self, text: str) -> None:
        """Write whole lines above."""
        with self._lock:
            self._send(f"{self._back()}\x1b[J{text}{self._frame()}\x1b[J")

    def refresh(self) -> None:
        """Draw anew."""
        with self._lock:
            back = self._back()
            self._send(f"{back}{self._frame()}\x1b[J")

    def _keep_drawing(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self.refresh()

    def _back(self) -> str:
        """Moves the cursor to the first drawn line. Terminals that have become narrower have broken each line into several."""
        width = max(1, self._console.size.width)
        rows = sum(max(1, -(-columns // width)) for columns in self._widths)
        return f"\x1b[{rows}A\r" if rows else "\r"

    def _frame(self) -> str:
        """All lines; one row of the screen is left free, or the first would scroll out of reach."""
        width, height = self._console.size
        lines = self._draw(width, max(1, height - 1))
        self._widths = [line.cell_len for line in lines]
        with self._console.capture() as captured:
            for line in lines:
                self._console.print(line, end="\n", no_wrap=True, crop=True)
        # each line is cleared before it is written: in the last column, what clears the rest would take the last character
        return "".join(f"\x1b[2K{line}\n" for line in captured.get().split("\n")[:-1])

    def _send(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # the terminal was closed; the run goes on, and nobody watches
            self._stream = io.StringIO()


class Lines(io.TextIOBase):
    """A stream that hands on whole lines; of what is redrawn with a carriage return, the last state."""

    def __init__(self, stream: TextIO, hand_on: Callable[[str], None]) -> None:
        super().__init__()
        self._real, self._hand_on = stream, hand_on
        self._rest = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream behind."""
        return self._real.encoding

    def isatty(self) -> bool:
        """As the stream behind: what is written here is seen there."""
        return self._real.isatty()

    def fileno(self) -> int:
        """Of the stream behind."""
        return self._real.fileno()

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, text: str) -> int:
        """Keep ``text`` until its line is whole."""
        *whole, self._rest = (self._rest + text).split("\n")
        if whole:
            self._hand_on("".join(f"{line.removesuffix(chr(13)).rpartition(chr(13))[2]}\n" for line in whole))
        return len(text)

    def finish(self) -> None:
        """Hand on a last line that has no end."""
        if self._rest.strip():
            self.write("\n")


@contextmanager
def held(name: str) -> Iterator[None]:
    """Keep what this process writes to the terminal, which another process draws on, to the end of the block; each line once."""
    kept: dict[str, None] = {}
    before = (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = (
        Lines(stream, lambda text: kept.update(dict.fromkeys(text.splitlines()))) if stream.isatty() else stream for stream in before
    )
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Lines):
                stream.finish()
        sys.stdout, sys.stderr = before
        for line in kept:
            before[1].write(f"{name}: {line}\n")
