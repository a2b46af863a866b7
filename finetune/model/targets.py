"""The modules of a loaded model that an adapter goes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from finetune.config.schema import AdaLora, Lora, SpectrumTargets, TiedLora, Vera
from finetune.errors import ConfigError, VerificationError
from finetune.planning.targets import chosen, find_named, in_mlp


def linear_modules(model: Any) -> list[str]:
    """Names of every linear module but the output head, quantized ones included."""
    output = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not output]


def embedding_module(model: Any) -> str:
    """Name of the input embedding."""
    embedding = model.get_input_embeddings()
    return str(next(name for name, module in model.named_modules() if module is embedding))


def find_targets(model: Any, tuning: Lora | TiedLora | AdaLora | Vera, ratios: Mapping[str, float] | None = None) -> list[str]:
    """Full names of the linear modules that ``tuning.targets`` means.

    ``ratios`` by module name, from `spectrum.ratios_for(tuning, base_dir)`, serve `{spectrum: share}` alone. Raises ConfigError where a
    name or pattern matches none, with the names that exist (pitfall A11).
    """
    names = linear_modules(model)
    targets = tuning.targets
    if isinstance(targets, SpectrumTargets):
        refuse_fused_experts(model, "spectrum")
        return _by_spectrum(names, targets.spectrum, ratios)
    if targets in ("mlp", "all-linear"):
        refuse_fused_experts(model, str(targets))
    return find_named(names, targets)


def _by_spectrum(names: Sequence[str], share: float, ratios: Mapping[str, float] | None) -> list[str]:
    if ratios is None:
        raise ValueError("targets by Spectrum need the ratios of the base: pass spectrum.ratios_for(tuning, base_dir)")
    missing = [name for name in names if name not in ratios]
    if missing:
        raise VerificationError(
            f"{missing[0]} has no signal-to-noise ratio", where="tuning.targets", fix="measure the base that was loaded: check model.id"
        )
    return chosen({name: ratios[name] for name in names}, share)


def refuse_fused_experts(model: Any, targets: str, fix: str = "use `targets: attention`, or list the modules by name") -> None:
    """ConfigError where experts are one 3-D parameter, and so no linear modules: ``targets`` would silently leave out most of the model."""
    fused = [name for name, parameter in model.named_parameters() if parameter.ndim >= 3 and in_mlp(name)]
    if fused:
        raise ConfigError(
            f"{targets} would leave out the fused experts {fused[0]}: they are no linear layers, and no targets in this version",
            where="tuning.targets",
            fix=fix,
        )
