"""Which modules an adapter goes to, and the role of each parameter: decided by names alone, so that a plan and a model agree."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from finetune.config.schema import RegexTargets
from finetune.errors import ConfigError, Problem

_ATTENTION = re.compile(r"\.(self_attn|attn|attention|self_attention)\.")
_MLP = re.compile(r"\.(mlp|feed_forward|ffn|block_sparse_moe|experts?)\.")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|wpe|word_embeddings|embeddings|embed_in|prompt_encoder)(\.|$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)(\.|$)")
_MAGNITUDES = re.compile(r"\.(lora_magnitude_vector|lora_E|vera_lambda_[bd]|ia3_l)(\.|$)")
_NORM = re.compile(r"norm[^.]*(\.|$)|\.ln_[^.]*\.", re.IGNORECASE)

_KEYS_AND_VALUES = (
    frozenset({"k_proj", "v_proj", "k", "v", "key", "value", "k_lin", "v_lin"}),
    # one matrix makes queries, keys and values: its output is scaled as a whole
    frozenset({"qkv_proj", "query_key_value", "Wqkv", "c_attn"}),
)
_INNER = frozenset({"down_proj", "fc2", "w2", "dense_4h_to_h", "fc_out", "wo"})
"""Linear layers that read the inner activation of the MLP. Fused experts are no linear layers and have none."""


@lru_cache(maxsize=1 << 14)  # asked several times of each of a 70B's two thousand tensors
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


def in_mlp(name: str) -> bool:
    """Whether a module or parameter belongs to an MLP."""
    return bool(_MLP.search(f".{name}."))


def find_named(names: Sequence[str], targets: str | tuple[str, ...] | RegexTargets) -> list[str]:
    """Those of ``names``, full names of linear modules, that ``targets`` means: a keyword, a list of names or a pattern.

    ConfigError where a name or pattern matches none, with the names that exist (pitfall A11).
    """
    if isinstance(targets, RegexTargets):
        found = [name for name in names if re.search(targets.regex, name)]
        return found or _refuse([targets.regex], names)
    if not isinstance(targets, str):
        return _by_name(names, targets)
    pattern = {"attention": _ATTENTION, "mlp": _MLP, "all-linear": re.compile("")}[targets]
    found = [name for name in names if pattern.search(f".{name}.")]
    return found or _refuse([targets], names)


def scaled_by_ia3(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The linear modules among ``names`` whose output IA3 scales (keys and values), and those whose input it scales (the MLP's inner one).

    ConfigError where either has no name that is known.
    """
    kinds = {name: kind_of(name) for name in names}
    attention = next((found for kind in _KEYS_AND_VALUES if (found := [name for name in kinds if kinds[name] in kind])), [])
    inner = [name for name in kinds if kinds[name] in _INNER or name.endswith(".mlp.c_proj")]
    if not attention or not inner:
        raise ConfigError(
            f"ia3 scales keys, values and the inner activation of the MLP, and this model's {'MLP' if attention else 'attention'} has no "
            "linear layer by a name that is known",
            where="tuning.method",
            fix=f"use `method: lora`; the model has {', '.join(sorted(set(kinds.values())))}",
        )
    return attention, inner


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
