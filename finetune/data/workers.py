"""Work on many pieces in several processes, in order, with flat memory and without a way to hang.

Processes are spawned and not forked: a forked tokenizer that has used its threads dead-locks (pitfall B10). A process that dies or stalls
ends the whole with an error, and no process outlives the one that started it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from finetune.errors import HardwareError
from finetune.process import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

STALL_S = 600.0
"""Longest time for one piece; the longest seen was under two seconds."""
SMALL = 20
"""Pieces that are worked on in this process before others are started, which takes seconds."""
_AHEAD = 2  # pieces in flight a process: enough to keep it busy, few enough to keep memory flat

_functions: list[Callable[[Any], Any]] = []  # in a process of the pool: the one function it was started for


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int | None = None, stall_s: float = STALL_S
) -> Iterator[Result]:
    """``function`` of every item, lazily and in order, on ``processes``; None: here for the first `SMALL`, then on every core.

    With several processes, ``function``, items and results must be picklable. HardwareError where a process dies or needs more than
    ``stall_s`` seconds for one item; what ``function`` raises passes through.
    """
    pending = iter(items)
    if processes is None:
        yield from map(function, islice(pending, SMALL))
        processes = cores()
    if processes == 1:
        yield from map(function, pending)
        return
    first = next(pending, None)
    if first is not None:
        yield from _on_processes(function, _chained(first, pending), processes, stall_s)


def _chained(first: Item, rest: Iterator[Item]) -> Iterator[Item]:
    yield first
    yield from rest


def _on_processes(function: Callable[[Item], Result], items: Iterator[Item], processes: int, stall_s: float) -> Iterator[Result]:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, (function,))
    futures: deque[Future[Result]] = deque()
    done = False
    try:
        for item in items:
            futures.append(pool.submit(_call, item))
            if len(futures) > processes * _AHEAD:
                yield _result(futures.popleft(), stall_s)
        while futures:
            yield _result(futures.popleft(), stall_s)
        done = True
    except BrokenProcessPool as error:
        raise HardwareError(
            "a process that prepares data died",
            where="data preparation",
            fix="it may have run out of memory: set data.processes: 1 (a script that calls finetune needs `if __name__ == '__main__':`)",
        ) from error
    finally:
        pool.shutdown(wait=done, cancel_futures=True)
        if not done:  # one that hangs would keep the interpreter from ending
            for process in set(multiprocessing.active_children()) - others:
                process.kill()


def _result(future: Future[Result], stall_s: float) -> Result:
    try:
        return future.result(timeout=stall_s)
    except TimeoutError as error:
        if future.done():  # raised by the function itself
            raise
        raise HardwareError(
            f"a process that prepares data gave no answer for {stall_s:.0f} seconds",
            where="data preparation",
            fix="set data.processes: 1 to see where it stalls",
        ) from error


def _begin(function: Callable[[Any], Any]) -> None:
    """In a new process: the parent alone answers to Ctrl-C, and its end is ours."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    _functions.append(function)


def _call(item: Any) -> Any:
    return _functions[0](item)
