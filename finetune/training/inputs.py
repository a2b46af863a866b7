"""What a run starts from: the model's place, the prepared data and every "auto", before a weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.config.schema import Config
from finetune.data.counted import note_of, remember
from finetune.data.prepare import PreparedData, prepare
from finetune.data.render import Renderer
from finetune.hardware import crowd_size, detect
from finetune.model.builtin import resolve_model
from finetune.model.load import load_tokenizer
from finetune.planning.checkpointing import sizes_of
from finetune.planning.resolve import Resolved, resolve
from finetune.planning.steps import Steps, count_steps
from finetune.planning.strategy import Crowd, read_weights


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known before a weight is loaded."""

    base: Path
    """Directory of the base model."""
    renderer: Renderer
    data: PreparedData
    resolved: Resolved
    steps: Steps


def gather(config: Config, progress: Callable[[str, int, int], None] = lambda *_: None) -> Inputs:
    """Find the model, prepare the data and decide every "auto"; nothing is written but the cache of prepared data.

    ``progress(stage, done, of)`` follows the preparation.
    """
    base = resolve_model(config.model.id, config.model.revision)
    renderer = Renderer(load_tokenizer(base, config.model.new_tokens))
    note = note_of(config)
    data = prepare(config.data, renderer, config.seed, progress)
    remember(note, data.report)
    crowd = Crowd(read_weights(base), *crowd_size())
    sizes = sizes_of(config)
    if sizes is not None:  # the data is known now: what it needs, and not what it might
        sizes = replace(sizes, longest=int(data.train.lengths.max()))
    return Inputs(base, renderer, data, resolve(config, detect(), crowd, sizes), count_steps(config, len(data.train)))
