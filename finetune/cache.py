"""Results that are worth keeping between runs, such as prepared data: whole or absent, and made once when several processes ask."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from finetune.errors import HardwareError, VerificationError
from finetune.sealed import sealed_directory, verify

_LOCK_TIMEOUT_S = 6 * 3600.0


def cache_directory() -> Path:
    """Where they lie: `$FINETUNE_CACHE` or `~/.cache/finetune`."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune").expanduser()


def cached(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The directory of ``kind`` under ``key``, made by ``make(empty directory)`` where it is not there or damaged.

    The key must hold everything that the content depends on. Processes that ask at the same time wait for the one that makes it. What
    ``make`` raises passes through, and nothing is kept. HardwareError: the cache cannot be written, or another process never ends.
    """
    directory = cache_directory() / kind / key
    if is_whole(directory):  # nothing is locked or written: a cache that others filled may be read-only
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_name(f"{key}.lock"), timeout=_LOCK_TIMEOUT_S):
            if not is_whole(directory):  # another may have made it in the meantime
                with sealed_directory(directory) as temporary:
                    make(temporary)
    except Timeout as error:
        raise HardwareError(
            f"another process has held the lock for {_LOCK_TIMEOUT_S / 3600:.0f} hours",
            where=str(directory),
            fix="end it, or set FINETUNE_CACHE to another directory",
        ) from error
    except OSError as error:
        raise HardwareError(
            f"the cache cannot be written: {error.strerror or error}",
            where=str(directory),
            fix="set FINETUNE_CACHE to a writable directory",
        ) from error
    return directory


def is_whole(directory: Path) -> bool:
    """Whether ``directory`` is sealed and every file is as it was written."""
    try:
        verify(directory)
    except VerificationError:
        return False
    return True
