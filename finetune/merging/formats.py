"""The kinds of adapter whose effect on the weights is known: the names of their tensors and the meaning of every switch.

A switch is used, or known to have no effect on the weights, or its being set is a reason to refuse the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft.utils.other import get_pattern_key

from finetune.errors import VerificationError
from finetune.merging.updates import LowRankUpdate, Scaling, Shape, SharedUpdate, SingularUpdate, Update
from finetune.model import parts

SHARED_A, SHARED_B = "base_model.vera_A", "base_model.vera_B"
"""VeRA's projections, which belong to no module."""

_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
)
_LORA_WITHOUT_EFFECT = frozenset({"lora_dropout", "megatron_core", "qalora_group_size", "loftq_config"})
"""PEFT ignores loftq_config without its own init, which is refused."""
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Starts that leave the base as it is. The others (pissa, olora, corda, ...) moved a part of the base into the adapter."""
_COPIES = frozenset({"peft_type", "modules_to_save"})

Build = Callable[[str, Mapping[str, str], Mapping[str, Any], Shape], Update]


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of adapter."""

    parts: Mapping[str, str]
    """Part by the end of a key: `.lora_A.weight` -> `a`. A part that starts with a dot is a whole copy of that tensor of the module."""
    known: frozenset[str]
    """Switches of adapter_config.json that are used or have no effect."""
    update: Build
    """(module, key by part, configuration, shape) -> update; VerificationError where parts are missing or do not fit."""


def _lora(module: str, keys: Mapping[str, str], config: Mapping[str, Any], shape: Shape) -> LowRankUpdate:
    embedding = "embedding_a" in keys
    expected = {"embedding_a", "embedding_b"} if embedding else {"a", "b"}
    _require_parts(module, keys, expected | ({"magnitude"} if config.get("use_dora") else set()))
    a, b = (keys["embedding_a"], keys["embedding_b"]) if embedding else (keys["a"], keys["b"])
    rank, scale = _rank_and_scale(module, config)
    _require_rank(module, shape(a), shape(b), rank)
    return LowRankUpdate(a, b, scale, rank, keys.get("magnitude"), embedding)


def _rank_and_scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale of ``module``, with the patterns matched as PEFT matches them."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = int(ranks.get(get_pattern_key(list(ranks), module), config["r"]))
    alpha = float(alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _adalora(module: str, keys: Mapping[str, str], config: Mapping[str, Any], shape: Shape) -> SingularUpdate:
    _require_parts(module, keys, {"a", "b", "e"})
    start = int(config["init_r"])
    kept = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
    rank = start if kept is None else sum(map(bool, kept))
    _require_rank(module, shape(keys["a"]), shape(keys["b"]), rank)
    if shape(keys["e"]) != (rank, 1):
        raise VerificationError(f"the singular values of {module} have the shape {shape(keys['e'])}, not rank {rank}")
    return SingularUpdate(keys["a"], keys["b"], keys["e"], float(config["lora_alpha"]) / (start + 1e-5))


def _vera(module: str, keys: Mapping[str, str], config: Mapping[str, Any], shape: Shape) -> SharedUpdate:
    _require_parts(module, keys, {"inner", "outer"})
    if not config.get("save_projection"):
        raise VerificationError(
            "the VeRA adapter was saved without its projections, which other versions of torch draw otherwise",
            fix="save it with save_projection: true",
        )
    _require_rank(module, shape(SHARED_A), shape(SHARED_B), int(config["r"]))
    if shape(keys["inner"]) != (int(config["r"]),) or len(shape(keys["outer"])) != 1:
        raise VerificationError(f"the vectors of {module} have the shapes {shape(keys['inner'])} and {shape(keys['outer'])}")
    return SharedUpdate(SHARED_A, SHARED_B, keys["inner"], keys["outer"])


def _ia3(module: str, keys: Mapping[str, str], config: Mapping[str, Any], shape: Shape) -> Scaling:
    _require_parts(module, keys, {"scale"})
    found = shape(keys["scale"])
    if len(found) != 2 or min(found) != 1:
        raise VerificationError(f"the scales of {module} have the shape {found}")
    of_inputs = found[0] == 1
    listed = config.get("feedforward_modules") or ()
    if of_inputs != any(module == name or module.endswith(f".{name}") for name in ([listed] if isinstance(listed, str) else listed)):
        raise VerificationError(f"the scales of {module} have the shape {found}, against what feedforward_modules says")
    return Scaling(keys["scale"], of_inputs)


def _copies_only(module: str, keys: Mapping[str, str], _config: Mapping[str, Any], _shape: Shape) -> Update:
    raise VerificationError(f"{module} has the parts {sorted(keys)}, which are no copies")


def _require_parts(module: str, keys: Mapping[str, str], expected: set[str]) -> None:
    if set(keys) != expected:
        raise VerificationError(f"{module} has the parts {sorted(keys)} instead of {sorted(expected)}")


def _require_rank(module: str, a: tuple[int, ...], b: tuple[int, ...], rank: int) -> None:
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise VerificationError(f"the factors of {module} have the shapes {(a, b)}, not rank {rank}")


FORMATS: Mapping[str, Format] = {
    "LORA": Format(
        {
            ".lora_A.weight": "a",
            ".lora_B.weight": "b",
            ".lora_embedding_A": "embedding_a",
            ".lora_embedding_B": "embedding_b",
            ".lora_magnitude_vector": "magnitude",
            ".token_adapter.trainable_tokens_delta": "rows",
        },
        _WITHOUT_EFFECT
        | _LORA_WITHOUT_EFFECT
        | _COPIES
        | {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"}
        | {"trainable_token_indices", "ensure_weight_tying"},
        _lora,
    ),
    "ADALORA": Format(
        {".lora_A": "a", ".lora_B": "b", ".lora_E": "e"},
        _WITHOUT_EFFECT
        | _LORA_WITHOUT_EFFECT
        | _COPIES
        | {"init_r", "lora_alpha", "rank_pattern", "init_lora_weights", "bias"}
        # the schedule of the ranks, and PEFT's field of another method
        | {"r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step", "orth_reg_weight"},
        _adalora,
    ),
    "VERA": Format(
        {".vera_lambda_d": "inner", ".vera_lambda_b": "outer"},
        _WITHOUT_EFFECT
        | _COPIES
        | {"r", "save_projection", "bias"}
        # how the tensors of the file came to be
        | {"projection_prng_key", "d_initial", "init_weights", "vera_dropout"},
        _vera,
    ),
    "IA3": Format({".ia3_l": "scale"}, _WITHOUT_EFFECT | _COPIES | {"feedforward_modules", "init_ia3_weights"}, _ia3),
    "LN_TUNING": Format(
        {".ln_tuning_layers.weight": ".weight", ".ln_tuning_layers.bias": ".bias"}, _WITHOUT_EFFECT | _COPIES, _copies_only
    ),
}
"""By `peft_type`."""

BITFIT = Format({".bias": ".bias"}, frozenset({"format", "method", "base_model_name_or_path"}), _copies_only)
"""The own format of `tuning.method: bitfit`, see `finetune.model.parts`."""

_NO_WEIGHTS = {
    "PROMPT_TUNING": "virtual tokens before the input",
    "P_TUNING": "virtual tokens before the input",
    "PREFIX_TUNING": "keys and values of virtual tokens",
}
"""Adapters that are no change of any weight."""


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """Every feature of ``config`` whose effect on the weights is not known."""
    form = format_of(config)
    if form is None:
        kind = config.get("peft_type")
        return [f"peft_type {kind!r} ({_NO_WEIGHTS[str(kind)]})" if str(kind) in _NO_WEIGHTS else f"peft_type {kind!r}"]
    found = []
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']!r}")
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        found.append(f"init_lora_weights {config['init_lora_weights']!r}, which changes the base")
    return found + [f"{key} {value!r}" for key, value in sorted(config.items()) if key not in form.known and value]


def format_of(config: Mapping[str, Any]) -> Format | None:
    """The kind of adapter that ``config`` describes; None where it is not known."""
    if config.get("format") == parts.FORMAT and config.get("method") == "bitfit":
        return BITFIT
    return FORMATS.get(str(config.get("peft_type")))
