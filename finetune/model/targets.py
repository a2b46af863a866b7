"""Which modules an adapter goes to, and the role of each parameter."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from finetune.config.schema import AdaLora, Lora, RegexTargets, SpectrumTargets, TiedLora, Vera
from finetune.errors import ConfigError, Problem, VerificationError

_ATTENTION = re.compile(r"\.(self_attn|attn|attention|self_attention)\.")
_MLP = re.compile(r"\.(mlp|feed_forward|ffn|block_sparse_moe|experts?)\.")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|wpe|word_embeddings|embeddings|embed_in|prompt_encoder)(\.|$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)(\.|$)")
_MAGNITUDES = re.compile(r"\.(lora_magnitude_vector|lora_E|vera_lambda_[bd]|ia3_l)(\.|$)")
_NORM = re.compile(r"norm[^.]*(\.|$)|\.ln_[^.]*\.", re.IGNORECASE)


def roles_of(parameter: str) -> tuple[str, ...]:
    """Every role that a parameter's full name has, such as ``("lora-b", "attention")``."""
    tests = {
        # whatever scales rows, columns or directions: DoRA's magnitudes, AdaLoRA's Lambda, VeRA's d and b, IA3's scales
        "magnitudes": bool(_MAGNITUDES.search(parameter)),
        "lora-a": ".lora_A." in parameter or "lora_embedding_A" in parameter,
        "lora-b": ".lora_B." in parameter or "lora_embedding_B" in parameter,
        "embeddings": bool(_EMBEDDINGS.search(parameter)),
        "lm_head": bool(_HEAD.search(parameter)),
        # q_norm and k_norm inside attention are norms first: their decay and rate follow other norms.
        "norms": bool(_NORM.search(parameter)),
        "attention": bool(_ATTENTION.search(parameter)),
        "mlp": bool(_MLP.search(parameter)),
    }
    return tuple(role for role, found in tests.items() if found)


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
    if isinstance(targets, RegexTargets):
        found = [name for name in names if re.search(targets.regex, name)]
        return found or _refuse([targets.regex], names)
    if not isinstance(targets, str):
        return _by_name(names, targets)
    if targets != "attention":
        refuse_fused_experts(model, targets)
    pattern = {"attention": _ATTENTION, "mlp": _MLP, "all-linear": re.compile("")}[targets]
    found = [name for name in names if pattern.search(f".{name}.")]
    return found or _refuse([targets], names)


def kind_of(module: str) -> str:
    """The type of a module, within which layers are compared: the last part of its name, such as `q_proj`."""
    return module.rpartition(".")[2]


def layer_of(module: str) -> int | None:
    """The layer a module is in: the first number in its name; None where there is none."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def ranked(ratios: Mapping[str, float]) -> dict[str, list[str]]:
    """Module names by type, the highest ratio first; equal ones in the order of ``ratios``."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(ratios, key=lambda name: -ratios[name]):
        kinds.setdefault(kind_of(name), []).append(name)
    return kinds


def chosen(ratios: Mapping[str, float], share: float) -> list[str]:
    """The top ``share`` (0 < share <= 1) of the modules of each type by ratio, at least one of each, in the order of ``ratios``."""
    top = {name for names in ranked(ratios).values() for name in names[: _count(share, len(names))]}
    return [name for name in ratios if name in top]


def _count(share: float, layers: int) -> int:
    # 0.29 of 100 layers is 29, not the 28 that 28.999999999999996 would be cut to
    return max(1, math.floor(share * layers + 1e-9))


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
    fused = [name for name, parameter in model.named_parameters() if parameter.ndim >= 3 and _MLP.search(f".{name}.")]
    if fused:
        raise ConfigError(
            f"{targets} would leave out the fused experts {fused[0]}: they are no linear layers, and no targets in this version",
            where="tuning.targets",
            fix=fix,
        )


def _by_name(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    unmatched = [target for target in targets if not any(_is_named(name, target) for name in names)]
    if unmatched:
        return _refuse(unmatched, names)
    return [name for name in names if any(_is_named(name, target) for target in targets)]


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _refuse(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    problems = []
    for pattern in patterns:
        near = difflib.get_close_matches(pattern, kinds, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        problems.append(
            Problem(
                f"no linear module of this model matches the target {pattern!r}",
                "tuning.targets",
                f"{hint}The model has {', '.join(kinds)}",
            )
        )
    raise ConfigError.from_problems(problems)
