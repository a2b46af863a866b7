"""Output whose reader may go away: a run is not ended because nobody reads its messages any more."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


def outlive_readers() -> None:
    """Let stdout and stderr drop what can no longer be read (`finetune train ... | head`, a `tee` that Ctrl-C ended first)."""
    sys.stdout, sys.stderr = Unread(sys.stdout), Unread(sys.stderr)


class Unread:
    """A text stream that goes on into nothing where its pipe is broken; all else is that of the stream it stands for."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of a file."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        """As of a file."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)
