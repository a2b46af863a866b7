"""The settings of this process that must stand before torch is loaded, and how the libraries are loaded."""

from __future__ import annotations

import gc
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KERNELS_KEPT = "256"
"""oneDNN compiles a kernel for each new shape of a product (1 ms), which takes 0.65 MB; its own limit of 1,024 is 0.7 GB. A micro-batch
needs about 80, of which those of attention are the same for every micro-batch."""


class _Kept:
    """Whether what the libraries leave in memory may stay there."""

    by_process = False


def own() -> None:
    """Say that the whole process is this program's, and ends with its command."""
    _Kept.by_process = True


def is_own() -> bool:
    """Whether the whole process is this program's."""
    return _Kept.by_process


def end_with_parent() -> None:
    """In a process that another one of this program started: its end is ours, at once and whatever is being computed."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Inside, Python does not search for garbage: many small objects that leave few cycles behind make it search the whole heap for them.

    What cycles there are is collected later; a long block calls `gc.collect(1)` now and then.
    """
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


@contextmanager
def loading() -> Iterator[None]:
    """The libraries that need torch are imported inside, in a process that is ready for them.

    They make half a million objects, nearly all of which stay. Python would search those for garbage again and again: a quarter of the
    time that importing takes, and where data is read and a model built half a second each time. So it does not while they are imported,
    and in a process that is `own` never looks at them again. Elsewhere it must: a caller's objects are among them, a model maybe.
    """
    prepare()
    if not _Kept.by_process:
        with collector_at_rest():
            yield
        return
    gc.collect()  # what an earlier stage left is not to be kept; a few milliseconds, since the libraries are passed over
    with collector_at_rest(), _compiling_when_called():
        try:
            yield
        finally:
            gc.freeze()


@contextmanager
def _compiling_when_called() -> Iterator[None]:
    """Inside, what `torch.compile` decorates is compiled by its first call instead of at once.

    bitsandbytes decorates two functions that few runs ever call, and the compiler takes half a second to load.
    """
    import torch

    at_once = torch.compile

    def compile_when_called(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return lambda decorated: compile_when_called(decorated, **options)
        compiled = cache(lambda: at_once(model, **options))

        @wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = compile_when_called
    try:
        yield
    finally:
        torch.compile = at_once


def prepare() -> None:
    """Settings that only work before torch starts its threads and allocates.

    Passive waiting: idle OpenMP threads sleep instead of spinning, which on a shared machine costs up to 2.4x in wall time. Allocation:
    glibc keeps freed activations instead of returning them to the kernel at every step (1.03x to 1.2x of a step). Tokenizer threads:
    off, since they dead-lock with forked workers. Compiled products: a bounded number is kept. Values that the user has set win.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS_KEPT)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # These speak of things that the user did not ask for and cannot change.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # `tuning.method: norm` is PEFT's LN tuning on a layer that it does not know by name, and works: it only multiplies weights.
    warnings.filterwarnings("ignore", r"Unsupported layer type '.*[nN]orm", category=UserWarning, module=r"peft\.")
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
