"""Checkpoints are written on a thread of their own while the next steps run: from a snapshot, and one at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from finetune.errors import FinetuneError, RunInterruptedError
from finetune.training.checkpoints import Snapshot
from finetune.training.signals import Interruption

Told = Callable[[int, Path], None]


class CheckpointWriter:
    """Writes one snapshot at a time; a context manager that ends only when the last one is on disk.

    What went wrong with a write is raised by the next call of `submit`, `poll` or `wait`, or when the block ends. Nothing is tried again: a
    disk that failed once is not trusted.
    """

    def __init__(self, write: Callable[[Snapshot], Path], told: Told) -> None:
        """``write`` puts a snapshot on disk, on the writer's thread; ``told`` hears (step, directory) of each, on the caller's."""
        self._write, self._told = write, told
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._flying: tuple[int, Future[Path]] | None = None

    def submit(self, snapshot: Snapshot) -> None:
        """Write ``snapshot`` from now on, after the one that is being written."""
        self.wait()
        self._flying = snapshot.progress.step, self._pool.submit(self._write, snapshot)

    def poll(self) -> None:
        """Tell of a write that has ended; does not wait."""
        if self._flying is not None and self._flying[1].done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written any more: all that was submitted is on disk."""
        if self._flying is not None:
            (step, future), self._flying = self._flying, None
            self._told(step, future.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for the last write. An interruption says that its checkpoint is saved, so a failed write takes its place; after any other
        error a failed write is told besides."""
        try:
            if not isinstance(error, Interruption):
                self.wait()
        except FinetuneError as failure:
            if error is None or isinstance(error, RunInterruptedError):
                raise
            if failure is not error and isinstance(error, FinetuneError):
                error.problems += failure.problems
        finally:
            self._pool.shutdown(wait=True)
