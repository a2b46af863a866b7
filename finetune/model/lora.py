"""PEFT's configuration of LoRA and its variants: rank and scale of every module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from finetune.config.schema import Lora
from finetune.errors import ConfigError, Problem
from finetune.model.targets import embedding_module, find_targets
from finetune.model.tokens import is_tied

ADAPTER = "default"
"""PEFT's name of the one adapter that a model carries here."""

_PEFT_INIT: dict[str, bool | str] = {"gaussian": "gaussian"}
"""Starts that PEFT draws. The others are written over its default one, once the adapter is there."""


@dataclass(frozen=True, slots=True)
class Strength:
    """Rank and alpha of the adapter of one module: h = Wx + s BAx with s = alpha/r (2106.09685), or alpha/sqrt(r) (2312.03732)."""

    rank: int
    alpha: float


def strengths(names: Iterable[str], tuning: Lora) -> dict[str, Strength]:
    """Rank and alpha of each module of ``names`` (full names in the base model), as the patterns of ``tuning`` say.

    A pattern is searched in the full name; the first that is found decides. ConfigError: a pattern decides for no module.
    """
    found = list(names)
    ranks, problems = _decided(found, tuning.rank_pattern, "rank_pattern")
    alphas, more = _decided(found, tuning.alpha_pattern, "alpha_pattern")
    if problems + more:
        raise ConfigError.from_problems(problems + more)
    return {name: Strength(int(ranks.get(name, tuning.rank)), float(alphas.get(name, tuning.alpha))) for name in found}


def _decided(names: list[str], patterns: Mapping[str, float], key: str) -> tuple[dict[str, float], list[Problem]]:
    """(value by module name, what is wrong with the patterns)."""
    values: dict[str, float] = {}
    problems = []
    for pattern, value in patterns.items():
        try:
            matching = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            problems.append(Problem(f"{pattern!r} is no regular expression: {error}", f"tuning.{key}", "escape dots as `\\.`"))
            continue
        new = [name for name in matching if name not in values]
        values.update(dict.fromkeys(new, value))
        if not matching:
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            what = f"no target module matches {pattern!r}"
            problems.append(Problem(what, f"tuning.{key}", f"The targets are {kinds}; a full name reads {names[0]}"))
        elif not new:
            what = f"{pattern!r} decides nothing: earlier patterns match all of its {len(matching)} modules"
            problems.append(Problem(what, f"tuning.{key}", "put it first, or remove it"))
    return values, problems


def patterns(modules: Mapping[str, Strength], usual: Strength) -> dict[str, dict[str, Any]]:
    """PEFT's `rank_pattern` and `alpha_pattern` for ``modules``: the exact names of those that differ from ``usual``.

    PEFT matches `(.*\\.)?(PATTERN)$` against the name. With escaped full names there is one reading of that, and it is ours.
    """
    return {
        "rank_pattern": {re.escape(name): one.rank for name, one in modules.items() if one.rank != usual.rank},
        "alpha_pattern": {re.escape(name): one.alpha for name, one in modules.items() if one.alpha != usual.alpha},
    }


def lora_config(model: Any, tuning: Lora, new_ids: Sequence[int] = ()) -> LoraConfig:
    """PEFT's configuration for ``tuning`` on ``model``, which has rows for the new tokens ``new_ids`` already.

    ConfigError where a target or a pattern matches nothing, or where new tokens are to train and there are none.
    """
    targets = find_targets(model, tuning)
    embedding = embedding_module(model)
    if tuning.embeddings == "lora":
        targets = [*targets, embedding]
    modules = strengths(targets, tuning)
    if tuning.init.method == "orthogonal":
        _require_even(modules)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        use_rslora=tuning.scaling == "rslora",
        use_dora=tuning.dora,
        lora_dropout=tuning.dropout,
        init_lora_weights=_PEFT_INIT.get(tuning.init.method, True),
        target_modules=targets,
        **patterns(modules, Strength(tuning.rank, tuning.alpha)),
        **_embedding_settings(model, tuning, new_ids),
    )


def _embedding_settings(model: Any, tuning: Lora, new_ids: Sequence[int]) -> dict[str, Any]:
    """What trains of embedding and head beside low-rank factors; see `finetune.model.tokens` for what the files then hold."""
    embedding, tied = embedding_module(model), is_tied(model)
    head = {} if tied or not new_ids else {_head_module(model): list(new_ids)}
    match tuning.embeddings:
        case "frozen" | "lora":
            return {}
        case "full":
            # without ensure_weight_tying PEFT would train a copy of the embedding, and leave a tied head behind
            return {"modules_to_save": [embedding], "ensure_weight_tying": tied, "trainable_token_indices": head or None}
        case "new-tokens":
            if not new_ids:
                raise ConfigError("there are no new tokens to train", where="tuning.embeddings", fix="list them in model.new_tokens")
            return {"trainable_token_indices": {embedding: list(new_ids), **head}}


def _head_module(model: Any) -> str:
    output = model.get_output_embeddings()
    return str(next(name for name, module in model.named_modules() if module is output))


def _require_even(modules: Mapping[str, Strength]) -> None:
    odd = {name: one.rank for name, one in modules.items() if one.rank % 2}
    if odd:
        name, rank = next(iter(odd.items()))
        what = f"orthogonal initialization needs an even rank, and {name} has {rank}"
        raise ConfigError(what, where="tuning.rank", fix=f"use {rank + 1}")


def lora_layers(model: Any) -> dict[str, Any]:
    """PEFT's LoRA layers over linear modules, by the name of the module in the base model; embeddings are not among them."""
    return {name: module for name, module in model.get_base_model().named_modules() if ADAPTER in getattr(module, "lora_A", {})}
