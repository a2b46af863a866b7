"""Which of several workers speaks, and in which order they fail."""

from __future__ import annotations

import os
import signal
import time

from finetune.errors import FinetuneError, HardwareError, RunInterruptedError, WorkerLostError

_PATIENCE = 10.0
"""Seconds in which the worker that knows best says what is wrong, and the launcher ends the others."""


def is_first() -> bool:
    """Whether this is the only worker or the first of several: it alone prints."""
    return os.environ.get("RANK", "0") == "0"


def is_mine_to_tell(error: FinetuneError) -> bool:
    """Whether this worker prints ``error``; waits where another is about to say it.

    What is wrong with files or with a step is mostly wrong for every worker, and the first says so; only memory, disk and devices are
    each worker's own. One that lost another does not know why. Ten seconds later the launcher has ended this process, or nobody else has
    noticed: then it was wrong here alone.
    """
    if isinstance(error, RunInterruptedError):
        return is_first()
    if isinstance(error, WorkerLostError) and error.told_to_stop:
        from finetune.hardware import STARTED_HERE

        return STARTED_HERE not in os.environ  # ended by our launcher, which has somebody else's reason
    if _another_says_it(error):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(_PATIENCE)
    return True


def _another_says_it(error: FinetuneError) -> bool:
    return isinstance(error, WorkerLostError) or not (is_first() or isinstance(error, HardwareError))
