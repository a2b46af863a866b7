"""What several processes that train together must agree on, and what becomes of the others when one fails."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed import DistError

from finetune.data.batches import cut
from finetune.errors import ConfigError, WorkerLostError
from finetune.training.batching import share

_LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out", "not connected", "remote process exited", "unhandled system error")
"""What gloo and NCCL say of a process that went away; gloo raises it as a plain RuntimeError."""


@contextmanager
def explained(stop: object = None) -> Iterator[None]:
    """Turn what torch raises when another worker went away, or never came, into WorkerLostError; ``stop`` is true once a signal came."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        lost = WorkerLostError(
            "another worker of this run has ended or cannot be reached",
            where=f"worker {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}",
            fix="its own message says why; if there is none, see that every node runs the same command and reaches MASTER_ADDR",
        )
        lost.told_to_stop = bool(stop)
        raise lost from error


def _is_lost(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, DistError) or ("gloo" in text and any(sign in text for sign in _LOST))


def require_own_launch() -> None:
    """ConfigError where `accelerate launch` does not do what it was told, or was told what the YAML file alone decides."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes, and starts only one on a CPU unless it goes through mpirun",
            where="accelerate launch --cpu",
            fix="finetune train CONFIG --devices N",
        )
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"accelerate's own configuration asks for {name}, which this program would not follow",
                where=f"accelerate launch ({variable})",
                fix="launch with --multi_gpu (or --cpu) and no config file, and set `distributed: {strategy: fsdp}` in the YAML file",
            )


def require_shared(path: Path) -> None:
    """ConfigError where the run directory that the first worker made cannot be seen from here."""
    if not path.is_file():
        raise ConfigError(
            "the run directory that the first worker made is not there for this one",
            where=f"worker {os.environ.get('RANK', '0')}: {path.parent.absolute()}",
            fix="set `output` to a directory that all nodes share, and start every node in the same working directory",
        )


def idle_rounds(pieces: Sequence[list[int]], rank: int, world: int) -> int:
    """How many micro-batches fewer device ``rank`` has than the one that has most."""
    return max(len(share(pieces, other, world)) for other in range(world)) - len(share(pieces, rank, world))


def idle_scores(lengths: Sequence[int], max_tokens: int, rank: int, world: int, *, packed: bool) -> int:
    """The same for validation, where device ``r`` scores every ``world``-th example from ``r``, each share cut on its own."""
    counts = [len(cut(list(lengths[other::world]), max_tokens, packed=packed)) for other in range(world)]
    return max(counts) - counts[rank]


def is_spread(model: torch.nn.Module) -> bool:
    """Whether the blocks of ``model`` are shared out, so that every device must run the same number of passes."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
