"""What each method of `tuning.method` can be combined with: one row a method, read by the checks of combinations.

A row that turns out wrong on real models is changed here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune.config.schema import (
    AdaLora,
    Bitfit,
    Full,
    Houlsby,
    Ia3,
    Lora,
    Norm,
    Prefix,
    Prompt,
    SpectrumTargets,
    Targets,
    TiedLora,
    Tuning,
    Vera,
)
from finetune.config.tree import KeyPath

_QUANTIZED = frozenset({"nf4", "fp4", "int8"})
_LAYERS = frozenset({"attention", "mlp"})
_FACTORS = frozenset({"lora-a", "lora-b"})


@dataclass(frozen=True, slots=True)
class Facts:
    """What one method can do."""

    roles: frozenset[str]
    """Roles of the parameters that can train; which of them do depends on the method's own keys."""
    quantized: frozenset[str] = _QUANTIZED
    """Values of `quantization.method`, beside `none`, that it works on."""
    why_not_quantized: str = ""
    """End of the sentence for the others: what it would have to train there."""
    lora_plus: bool = False
    """Whether it has factors A and B that `optimizer.lora_plus_ratio` can tell apart."""
    matrices: bool = True
    """Whether it trains matrices, which `optimizer.method: muon` is about."""


FACTS: Mapping[type[Tuning], Facts] = {
    Lora: Facts(_LAYERS | _FACTORS | {"embeddings", "magnitudes"}, lora_plus=True),
    TiedLora: Facts(_LAYERS | _FACTORS, lora_plus=True),
    AdaLora: Facts(_LAYERS | _FACTORS),
    Vera: Facts(_LAYERS, matrices=False),
    Ia3: Facts(_LAYERS, matrices=False),
    Prompt: Facts(frozenset(), matrices=False),
    Prefix: Facts(frozenset(), matrices=False),
    Norm: Facts(frozenset({"norms"}), matrices=False),
    Bitfit: Facts(_LAYERS | {"norms"}, matrices=False),
    Houlsby: Facts(_LAYERS),
    Full: Facts(_LAYERS | {"embeddings", "lm_head", "norms"}, frozenset(), "trains every weight"),
}

INITS_OF_PLAIN_BASES: Mapping[str, str] = {
    "pissa": "takes the largest directions out of the base",
    "olora": "takes directions out of the base",
}
"""`tuning.init.method` that needs an unquantized base -> why."""


def facts(tuning: Tuning) -> Facts:
    """The row of ``tuning``."""
    return FACTS[type(tuning)]


def targets_of(tuning: Tuning) -> Targets | None:
    """`tuning.targets` of the methods that put adapters on linear modules; None for the others."""
    return tuning.targets if isinstance(tuning, Lora | TiedLora | AdaLora | Vera) else None


def silent_roles(tuning: Tuning) -> list[tuple[str, str, str, KeyPath]]:
    """Roles that ``tuning`` could train and does not: the role, why, what to change, and the key that decides."""
    found: list[tuple[str, str, str, KeyPath]] = []
    targets = targets_of(tuning)
    for role, other in (("attention", "mlp"), ("mlp", "attention")):
        if targets == other:
            fix = "set `tuning.targets: all-linear`, or remove the group"
            found.append((role, f"`tuning.targets` is `{targets}`", fix, ("tuning", "targets")))
    match tuning:
        case Lora():
            if tuning.embeddings == "frozen":
                fix = "set `tuning.embeddings: lora` (or `full`), or remove the group"
                found.append(("embeddings", "the embeddings are frozen", fix, ("tuning", "embeddings")))
            if not tuning.dora:
                fix = "set `tuning.dora: true`, or remove the group"
                found.append(("magnitudes", "only DoRA has magnitudes", fix, ("tuning", "dora")))
        case Houlsby(placement="mlp"):
            fix = "set `tuning.placement: both`, or remove the group"
            found.append(("attention", "`tuning.placement` is `mlp`", fix, ("tuning", "placement")))
        case Full(targets=SpectrumTargets()):
            fix = "set `tuning.targets: all`, or remove the group"
            why = "`tuning.targets` chooses linear weights of the layers alone"
            found.extend((role, why, fix, ("tuning", "targets")) for role in ("embeddings", "lm_head", "norms"))
    return found
