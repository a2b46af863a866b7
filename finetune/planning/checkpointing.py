"""`train.gradient_checkpointing: auto` on a GPU: activations are computed again, and wait in host memory where nothing else fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune.config.schema import Config
from finetune.errors import ConfigError
from finetune.planning.lookup import find_shape
from finetune.planning.memory import Setting, estimate_memory
from finetune.planning.parameters import Parameters, count_parameters
from finetune.planning.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides how much memory a run takes, apart from its settings."""

    shape: ModelShape
    parameters: Parameters
    longest: int
    """Tokens of the longest example, or the most that it may have."""


def sizes_of(config: Config) -> Sizes | None:
    """Without a look at the data; None where the shapes of the model are not known, or `tuning` fits nothing in it."""
    try:
        shape = find_shape(config.model)
        return Sizes(shape, count_parameters(shape, config), config.data.max_tokens)
    except ConfigError:  # said by what builds the model; a run whose memory cannot be told is not decided by it
        return None


def needs_offload(config: Config, sizes: Sizes, setting: Setting, room: int) -> bool:
    """Whether a device with ``room`` bytes holds the run with its hidden states in host memory, and does not hold it otherwise.

    ``setting`` has the micro-batch that is stated, or the least that training may choose: one example.
    """
    held = min(max(setting.tokens, sizes.longest), config.train.batch_size * sizes.longest)
    kept, moved = (
        estimate_memory(sizes.shape, sizes.parameters, config, replace(setting, tokens=held, checkpointing=True, offload=offload))
        for offload in (False, True)
    )
    return kept.firm > room >= moved.firm
