"""What `--gpu` may be, and what is said of another word: the GPUs that there are, the nearest first."""

from __future__ import annotations

from collections.abc import Callable
from difflib import SequenceMatcher

from finetune.errors import ConfigError
from finetune.planning.gpus import BY_SIZE, GPUS, Gpu
from finetune.planning.placement import size_of

_ALIKE = 0.5
"""Share of letters from which a word is taken for the name of a GPU."""


def gigabytes(word: str) -> int:
    """The size that ``word`` means; ConfigError, which names the GPUs of all sizes, where it is none of them."""
    try:
        size = size_of(word)
    except ConfigError as error:
        raise ConfigError(error.problems[0].what, where=f"--gpu {word}", fix=_nearest_first(_distance_of_name(word))) from error
    if size not in BY_SIZE:
        raise ConfigError(f"no common GPU has {size} GB", where=f"--gpu {word}", fix=_nearest_first(lambda one: abs(one - size)))
    return size


def _distance_of_name(word: str) -> Callable[[int], float]:
    """How far a size is from the memory of the GPU that is called most like ``word``; the same for all where none is."""

    def alike(gpu: Gpu) -> float:
        return SequenceMatcher(None, word.lower(), gpu.name.lower()).ratio()

    meant = max(GPUS, key=alike)
    return lambda size: abs(size - meant.gib) if alike(meant) >= _ALIKE else 0.0


def _nearest_first(distance: Callable[[int], float]) -> str:
    return "use one of " + ", ".join(f"{size} ({BY_SIZE[size]})" for size in sorted(BY_SIZE, key=distance))
