"""Lanes of a step in forked processes.

Threads of one interpreter wait for each other between operations: in a lane of SmolLM2 950 times, and a step takes 6 % longer for it. A
fork has an interpreter of its own and finds everything else in place: the frozen weights are the same pages of memory, and rows and code
need not be sent. Only what changes between steps lies in memory that both write to: the parameters that train, and gradients on their way
back.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch

from finetune import process
from finetune.errors import HardwareError
from finetune.training.input_clock import InputClock
from finetune.training.lanes import Computed, Lane, Parameters, accumulated
from finetune.training.signals import ASKED

_ALIGNMENT = 64
"""Bytes: a cache line, as torch's own allocator has it."""
_GROWN = 2**20
"""Bytes by which a process may grow before its memory is counted again, which takes 20 ms a GiB."""
_STALL_S = 600.0
_STALL_LANES = 20
"""A fork that needs longer than both, the second in times of what this process took for its own lane, has stalled: lanes cost the same."""


def can_fork() -> bool:
    """Whether a fork of this process computes what this one would.

    The threads of another's program may hold locks that nobody would release in a fork; and no fork can use an accelerator.
    """
    return sys.platform == "linux" and process.is_own() and not torch.accelerator.is_available()


LossOfStep = Callable[[list[int], float], torch.Tensor]
"""The share of a micro-batch in the loss of a step of so many supervised tokens."""


@dataclass(frozen=True, slots=True)
class _Task:
    place: int
    """Which of the shared gradients are to be set."""
    lane: Lane
    supervised: float
    threads: int


@dataclass(frozen=True, slots=True)
class _Answer:
    loss: float
    reached: set[int]
    """Places of the shared gradients that anything was added to."""
    input_seconds: float
    memory_bytes: int


class Forks:
    """Forks of this process that compute lanes beside it; each starts with the first step that needs it."""

    def __init__(self, loss_of: LossOfStep, parameters: Parameters, clock: InputClock) -> None:
        """``clock`` has what ``loss_of`` waits for."""
        self._loss_of, self._parameters, self._clock = loss_of, parameters, clock
        self._shared: list[torch.Tensor] = []
        self._gradients: list[list[torch.Tensor]] = []
        self._processes: list[tuple[Any, Connection]] = []
        self._refused = False
        self._memory: dict[int, int] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Whatever happens inside, no fork outlives the block. After an error in a step no other is computed."""
        try:
            yield
        except BaseException:
            for each, _ in self._processes:  # it may be in the middle of a pass that nobody waits for
                each.kill()
            raise
        finally:
            for each, connection in self._processes:
                connection.close()
                each.join()
            self._processes.clear()

    def memory_bytes(self) -> int:
        """What forks have beside the pages that they share with this process."""
        return sum(self._memory.values())

    def ready(self, count: int) -> bool:
        """Whether there are so many forks; if not they are started, unless the system has refused one: memory, or a limit of processes."""
        while len(self._processes) < count and not self._refused:
            try:
                self._fork()
            except OSError as error:
                self._refused = True
                warnings.warn(f"another process is refused ({error}): a step is computed in threads, a little slower", stacklevel=2)
        return not self._refused

    def submit(self, supervised: float, place: int, lane: Lane, threads: int) -> Callable[[], Computed]:
        """In a step of ``supervised`` tokens, begin ``lane``, the ``place``-th that is not computed here.

        It is `ready`. The function returned waits for the lane, or raises what it raised.
        """
        for parameter, shared in zip(self._parameters, self._shared, strict=True):
            if parameter.data_ptr() != shared.data_ptr():  # something gave it a tensor of its own
                shared.copy_(parameter.detach())
        connection = self._processes[place][1]
        with _explained():
            connection.send(_Task(place, lane, supervised, threads))
        return partial(self._result, place, time.monotonic())

    def _result(self, place: int, began: float) -> Computed:
        connection, limit = self._processes[place][1], max(_STALL_S, _STALL_LANES * (time.monotonic() - began))
        with _explained():
            if not connection.poll(limit):
                raise HardwareError(
                    f"a process that computes a part of each step gave no answer for {limit:.0f} seconds",
                    where="training",
                    fix="continue with --resume and OMP_NUM_THREADS=1",
                )
            answer = connection.recv()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, _Answer)
        self._memory[place] = answer.memory_bytes
        self._clock.add(place, answer.input_seconds)
        return Computed(torch.tensor(answer.loss), self._gradients[place], answer.reached)

    def _fork(self) -> None:
        """OSError where the system has no room for another."""
        if not self._shared:
            self._shared = _in_shared_memory(self._parameters)
            for parameter, shared in zip(self._parameters, self._shared, strict=True):
                parameter.data = shared.copy_(parameter.detach())
        gradients = _in_shared_memory(self._parameters)
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        ours = [connection for _, connection in self._processes] + [here]
        fork = context.Process(target=self._serve, args=(there, ours, [*self._gradients, gradients]))
        try:
            with warnings.catch_warnings():  # of threads: torch's wait for work, and none of a fork's waits for them
                warnings.simplefilter("ignore", DeprecationWarning)
                fork.start()
        except OSError:
            here.close()
            raise
        finally:
            there.close()
        self._gradients.append(gradients)
        self._processes.append((fork, here))

    def _serve(self, connection: Connection, others: Sequence[Connection], gradients: list[list[torch.Tensor]]) -> None:
        """In a fork: compute lanes until the process that it came from closes its end of ``connection``, or ends.

        That process alone answers signals, and alone speaks: its lane warns of the same, and a live view would be drawn over. The threads
        that OpenMP keeps for the thread that forked are not here, so another one computes.
        """
        for number in ASKED:
            signal.signal(number, signal.SIG_IGN)
        process.end_with_parent()
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        warnings.simplefilter("ignore")
        for other in others:
            other.close()
        self._gradients = gradients
        self._clock.take()  # what the process before the fork waited for
        gc.freeze()  # to search them would copy the pages of all objects that there are
        computing = threading.Thread(target=self._answer_all, args=(connection,))
        computing.start()
        computing.join()

    def _answer_all(self, connection: Connection) -> None:
        memory = _OwnMemory()
        with suppress(EOFError, OSError):  # the end of the connection
            while True:
                task = connection.recv()
                answer = self._answer(task, memory)
                connection.send(answer)

    def _answer(self, task: _Task, memory: _OwnMemory) -> _Answer | Exception:
        try:
            torch.set_num_threads(task.threads)
            for parameter, shared in zip(self._parameters, self._shared, strict=True):
                if parameter.data_ptr() != shared.data_ptr():  # it was replaced before this fork was made, or by the last pass
                    parameter.data = shared
            gradients = self._gradients[task.place]
            found = accumulated(task.lane, lambda piece: self._loss_of(piece, task.supervised), self._parameters, gradients)
            return _Answer(float(found.loss), found.reached, self._clock.take(), memory.bytes())
        except Exception as error:  # noqa: BLE001 - whatever it is, the process that asked raises it
            sent = error if _can_be_sent(error) else RuntimeError(f"{type(error).__name__}: {error}")
            sent.add_note(f"In the process of another lane:\n{traceback.format_exc()}")
            return sent


def _can_be_sent(error: Exception) -> bool:
    """Whether ``error`` can be made again from its arguments, which not all that libraries derive can."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # noqa: BLE001 - its own constructor may raise anything
        return False
    return True


@contextmanager
def _explained() -> Iterator[None]:
    """HardwareError where the other end of a connection is gone."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise HardwareError(
            "a process that computes a part of each step has died",
            where="training",
            fix="it may have run out of memory: continue with --resume and a smaller train.tokens_per_device",
        ) from error


class _OwnMemory:
    """The memory of a fork that is not the same as that of the process it came from."""

    def __init__(self) -> None:
        self._most, self._seen = 0, (-_GROWN, -_GROWN)

    def bytes(self) -> int:
        """The most so far, counted again when more pages were touched (copies are no growth) or there are more (a fault may bring many)."""
        statistics, counts = Path("/proc/self/statm"), Path("/proc/self/smaps_rollup")
        if not (statistics.is_file() and counts.is_file()):  # not every kernel tells
            return 0
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, int(statistics.read_text(encoding="ascii").split()[1])
        if any(now - then >= _GROWN // mmap.PAGESIZE for now, then in zip(pages, self._seen, strict=True)):
            self._seen = pages
            lines = counts.read_text(encoding="ascii").splitlines()
            own = sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))
            self._most = max(self._most, 1024 * own)
        return self._most


def _in_shared_memory(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Zeros that lie as ``tensors`` do, in memory that forks write to as well. Unlike /dev/shm, no container limits it."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    *starts, end = accumulate(sizes, initial=0)
    memory = mmap.mmap(-1, end)
    return [
        torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).as_strided(
            tensor.size(), torch.empty_like(tensor, device="meta").stride()
        )
        for tensor, start in zip(tensors, starts, strict=True)
    ]
