"""Lanes of a step in forked processes.

Threads of one interpreter wait for each other between operations: in a lane of SmolLM2 950 times, together 6 to 7 % of a step. A fork has
an interpreter of its own and finds everything else in place: the frozen weights are the same pages of memory, and rows and code need not
be sent. Only what changes between steps lies in memory that both write to: the parameters that train, and gradients on their way back.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import resource
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from finetune import process
from finetune.errors import FinetuneError, HardwareError
from finetune.training.input_clock import InputClock
from finetune.training.lanes import Computed, Lane, Parameters, accumulated
from finetune.training.signals import ASKED

_ALIGNMENT = 64
"""Bytes: a cache line, as torch's own allocator has it."""
_GROWN = 256
"""Pages that a process may touch before its memory is counted again, which takes 20 ms a GiB."""


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
        self._memory: dict[int, int] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Whatever happens inside, no fork outlives the block."""
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

    def submit(self, supervised: float, place: int, lane: Lane, threads: int) -> Callable[[], Computed]:
        """In a step of ``supervised`` tokens, begin ``lane``, the ``place``-th that is not computed here.

        The function returned waits for it, or raises what it raised.
        """
        while place >= len(self._processes):
            self._fork()
        for parameter, shared in zip(self._parameters, self._shared, strict=True):
            if parameter.data_ptr() != shared.data_ptr():  # something gave it a tensor of its own
                shared.copy_(parameter.detach())
        connection = self._processes[place][1]
        with _told():
            connection.send(_Task(place, lane, supervised, threads))
        return lambda: self._result(place)

    def _result(self, place: int) -> Computed:
        with _told():
            answer = self._processes[place][1].recv()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, _Answer)
        self._memory[place] = answer.memory_bytes
        self._clock.add(place, answer.input_seconds)
        return Computed(torch.tensor(answer.loss), self._gradients[place], answer.reached)

    def _fork(self) -> None:
        try:
            if not self._shared:
                self._shared = _in_shared_memory(self._parameters)
                for parameter, shared in zip(self._parameters, self._shared, strict=True):
                    parameter.data = shared.copy_(parameter.detach())
            self._gradients.append(_in_shared_memory(self._parameters))
            context = multiprocessing.get_context("fork")
            here, there = context.Pipe()
            ours = [connection for _, connection in self._processes] + [here]
            fork = context.Process(target=self._serve, args=(there, ours))
            with warnings.catch_warnings():  # of threads: torch's wait for work, and none of a fork's waits for them
                warnings.simplefilter("ignore", DeprecationWarning)
                fork.start()
        except OSError as error:
            raise HardwareError(
                f"another process, to compute a part of each step, cannot be started: {error}",
                where="training",
                fix="free memory or processes, or set OMP_NUM_THREADS=1",
            ) from error
        there.close()
        self._processes.append((fork, here))

    def _serve(self, connection: Connection, others: Sequence[Connection]) -> None:
        """In a fork: compute lanes until the process that it came from closes its end of ``connection``, or ends.

        That process alone answers signals. The threads that OpenMP keeps for the thread that forked are not here, so another one computes.
        """
        for number in ASKED:
            signal.signal(number, signal.SIG_IGN)
        for other in others:
            other.close()
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
            gradients = self._gradients[task.place]
            found = accumulated(task.lane, lambda piece: self._loss_of(piece, task.supervised), self._parameters, gradients)
            return _Answer(float(found.loss), found.reached, self._clock.take(), memory.bytes())
        except Exception as error:  # noqa: BLE001 - whatever it is, the process that asked raises it
            sent = error if _can_be_sent(error) else RuntimeError(f"{type(error).__name__}: {error}")
            sent.add_note(f"In the process of another lane:\n{traceback.format_exc()}")
            return sent


def _can_be_sent(error: Exception) -> bool:
    """Whether ``error`` is made again from its arguments: not all that libraries derive are."""
    return isinstance(error, FinetuneError) or type(error).__module__ == "builtins"


@contextmanager
def _told() -> Iterator[None]:
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
        self._bytes, self._touched = 0, -_GROWN

    def bytes(self) -> int:
        """As counted when it last grew: what was freed stays with the process."""
        touched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if touched - self._touched >= _GROWN:
            self._touched = touched
            lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
            self._bytes = 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))
        return self._bytes


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
