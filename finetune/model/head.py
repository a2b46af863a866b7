"""Cross-entropy over supervised positions only, in chunks, so that memory does not grow with vocabulary x length."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK = 512
"""Positions whose logits exist at a time."""

_HEAD_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def causal_model(model: Any) -> Any:
    """The causal language model inside a PEFT model, or ``model`` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: Any) -> Any:
    """The decoder below the head of a causal language model."""
    return getattr(model, model.base_model_prefix)


def has_plain_head(model: Any) -> bool:
    """Whether logits are just ``head(hidden)``: models that scale or cap them go through their own forward."""
    return all(getattr(model.config, name, None) in (None, 1, 1.0) for name in _HEAD_SCALES)


def target_losses(model: Any, ids: torch.Tensor, attention: torch.Tensor, supervised: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every supervised token, in order of (row, position).

    Position p predicts token p+1, so the hidden states before the supervised tokens are gathered first and only they meet the head.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        ids: (b, t) int64 token ids, padded on the right.
        attention: (b, t) int64, 1 where a token stands, 0 where padding does.
        supervised: (b, t) bool, True where the token is a target; the first column never counts.

    Returns:
        (n,) fp32 nats, n = number of supervised tokens.
    """
    core = causal_model(model)
    wanted = supervised[:, 1:]
    targets = ids[:, 1:][wanted]
    if not has_plain_head(core):
        logits = core(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1][wanted]
        return functional.cross_entropy(logits.float(), targets, reduction="none")
    hidden = backbone(core)(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    return hidden_losses(hidden[:, :-1][wanted], core.get_output_embeddings(), targets)


def hidden_losses(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Losses of hidden (n, d) against targets (n,), recomputing each chunk's logits in the backward pass."""

    def losses(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(head(rows).float(), wanted, reduction="none")

    pieces = []
    for rows, wanted in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(losses, rows, wanted, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(losses(rows, wanted))
    return torch.cat(pieces)
