"""PEFT's configuration of LoRA and its variants: rank and scale of every module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig

from finetune.config.schema import Lora
from finetune.errors import ConfigError
from finetune.model.targets import embedding_module, find_targets
from finetune.model.tokens import is_tied
from finetune.planning.ranks import Strength, strengths

ADAPTER = "default"
"""PEFT's name of the one adapter that a model carries here."""

_PEFT_INIT: dict[str, bool | str] = {"gaussian": "gaussian"}
"""Starts that PEFT draws. The others are written over its default one, once the adapter is there."""


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
