"""How much of its rank each update of a finished adapter uses, and how large it is: from the adapter's files alone, without the base."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.analysis.adapter import AdapterFile, Update
from finetune.analysis.update_spectra import directions, effective_rank
from finetune.config.schema import Config, LoftqInit, Lora, OloraInit, PissaInit
from finetune.planning.targets import kind_of, roles_of
from finetune.runs import RunDirectory


@dataclass(frozen=True, slots=True)
class UsedRank:
    """The update of one module."""

    module: str
    role: str
    """`attention`, `mlp` or `embeddings`; the last part of the module's name where it is none of them."""
    rank: int
    """The largest rank that the update can have."""
    effective_rank: float
    """exp of the entropy of the normalized singular values; 0 for an update of zeros."""
    size: float
    """Root mean square of its elements."""


def used_ranks(run: RunDirectory, config: Config) -> list[UsedRank]:
    """Every module of a ``run`` for which `checks.no_factors` has no objection. VerificationError where a file is damaged."""
    init = config.tuning.init if isinstance(config.tuning, Lora) else None
    doubled = isinstance(init, PissaInit | OloraInit)
    with AdapterFile(run.adapter, loftq=isinstance(init, LoftqInit), doubled=doubled) as adapter:
        return [_used(update) for update in adapter.updates()]


def _used(update: Update) -> UsedRank:
    found = directions(update.left, update.right)
    outputs, inputs = update.left.shape[0], update.right.shape[0]
    roles = set(roles_of(f"{update.module}.weight")) & {"attention", "mlp", "embeddings"}
    return UsedRank(
        module=update.module,
        role=next(iter(roles), kind_of(update.module)),
        rank=min(update.left.shape[1], outputs, inputs),
        effective_rank=effective_rank(found.sigma),
        size=found.norm / math.sqrt(outputs * inputs),
    )
