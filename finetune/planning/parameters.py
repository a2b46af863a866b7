"""How many parameters a run has, and how many of them train, by learning-rate group: from shapes alone, and exact."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from finetune.config.schema import ROLES, AdaLora, Config, Full, Lora, SpectrumTargets, Tuning
from finetune.planning.groups import ParameterGroup, assign_groups
from finetune.planning.ranks import init_rank
from finetune.planning.shapes import ModelShape, Shape
from finetune.planning.tensors import Base, buffers, trained_tensors

_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class Trained:
    """A trainable tensor that is not there yet."""

    shape: Shape

    @property
    def scalars(self) -> int:
        """Its number of scalars."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a run, in scalars."""

    tensors: Mapping[str, Trained]
    """All that trains, by its name in the model; what several layers share is there once. Where Spectrum chooses the layers, the first
    ones stand for those it will choose."""
    by_part: Mapping[str, int]
    """All parameters by what they are: `blocks` (matrices of the blocks, without biases), `embeddings`, `head`, `norms`, `biases`, and
    `added` by the method. Empty parts are left out."""
    groups: tuple[ParameterGroup, ...]
    """Learning-rate groups as training makes them, in its order; empty where only Spectrum's choice will decide them."""
    buffers: int = 0
    """Scalars that are no parameters but take memory: VeRA's random matrices."""
    notes: tuple[str, ...] = ()
    """What of these numbers the weights, the tokenizer or the training will decide."""

    @property
    def trainable(self) -> int:
        """All that trains."""
        return sum(tensor.scalars for tensor in self.tensors.values())

    @property
    def base(self) -> int:
        """Of the base model, with the rows of new tokens."""
        return self.total - self.added

    @property
    def added(self) -> int:
        """What the method adds to the base, AdaLoRA's count of ranks (one a module, never trained) included; 0 for full tuning."""
        return self.by_part.get("added", 0)

    @property
    def in_base(self) -> bool:
        """Whether what trains are the base's own parameters (full tuning) instead of additions to it."""
        return not self.added

    @property
    def total(self) -> int:
        """Of the model as it is trained: the base and what the method adds."""
        return sum(self.by_part.values())

    @property
    def by_group(self) -> dict[str, int]:
        """Trainable parameters by learning-rate group."""
        return {group.name: group.parameters for group in self.groups}


def count_parameters(shape: ModelShape, config: Config) -> Parameters:
    """The parameters of a run of ``config`` on a model of ``shape``.

    ConfigError where `tuning` finds nothing in the model that it could train, where a target or a pattern matches nothing, and where a
    group of `optimizer.groups` does.
    """
    tuning = config.tuning
    base = Base(shape, len(config.model.new_tokens))
    tensors = _trained(base, tuning)
    return Parameters(
        tensors=tensors,
        by_part=_by_part(base, tuning, tensors),
        groups=_groups(base, config, tensors),
        buffers=sum(math.prod(sides) for sides in buffers(base, tuning).values()),
        notes=tuple(_notes(base, config)),
    )


def _trained(base: Base, tuning: Tuning) -> dict[str, Trained]:
    return {name: Trained(sides) for name, sides in trained_tensors(base, tuning).items()}


def _by_part(base: Base, tuning: Tuning, tensors: Mapping[str, Trained]) -> dict[str, int]:
    shape, whole = base.shape, base.rows * base.shape.hidden
    added = 0 if isinstance(tuning, Full) else sum(tensor.scalars for tensor in tensors.values())
    if isinstance(tuning, AdaLora):
        added += len(tensors) // 3  # A, Lambda and B of a module stand beside the count of its ranks
    parts = {
        "blocks": shape.blocks_scalars,
        "embeddings": whole,
        "head": 0 if shape.tied else whole,
        "norms": shape.norms_scalars,
        "biases": shape.biases_scalars,
        "added": added,
    }
    return {name: count for name, count in parts.items() if count}


def _groups(base: Base, config: Config, tensors: Mapping[str, Trained]) -> tuple[ParameterGroup, ...]:
    possible = _possible(base, config.tuning)
    if possible is None:
        return tuple(assign_groups(tensors, config.optimizer))
    assign_groups(possible, config.optimizer)  # an entry that matches nothing of all this matches nothing of what is chosen
    if _tell_layers((entry for entry in config.optimizer.groups if entry not in ROLES), possible):
        return ()
    return tuple(assign_groups(tensors, config.optimizer))


def _possible(base: Base, tuning: Tuning) -> dict[str, Trained] | None:
    """Every tensor that would train if Spectrum chose all layers; None where it chooses none."""
    if not isinstance(getattr(tuning, "targets", None), SpectrumTargets):
        return None
    return _trained(base, tuning.model_copy(update={"targets": SpectrumTargets(spectrum=1.0)}))


def _tell_layers(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of ``patterns`` that match ``names`` of some layers and not of others."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_LAYER.sub(".", name, count=1), []).append(name)
    return [
        pattern
        for pattern in patterns
        if any(len({re.search(pattern, name) is None for name in members}) == 2 for members in alike.values())
    ]


def _notes(base: Base, config: Config) -> Iterator[str]:
    tuning, shape = config.tuning, base.shape
    if (possible := _possible(base, tuning)) is not None:
        modules = [name for name, _ in shape.modules()]
        ranks = _tell_layers(tuning.rank_pattern if isinstance(tuning, Lora) else (), modules)
        groups = _tell_layers((entry for entry in config.optimizer.groups if entry not in ROLES), possible)
        if ranks:
            yield f"about: `rank_pattern` {ranks[0]!r} names layers, and which layers train is read off the weights (`targets: spectrum`)"
        if groups:
            yield f"the group {groups[0]!r} names layers, and which layers train is read off the weights (`targets: spectrum`)"
    if base.new_tokens and shape.tokens is None:
        yield f"the embedding is taken to grow by {base.new_tokens} rows: how many it has to spare, the tokenizer tells"
    if isinstance(tuning, AdaLora):
        yield f"ranks are pruned from {init_rank(tuning)} to a mean of {tuning.rank} while it trains; the pruned stay in memory as zeros"
