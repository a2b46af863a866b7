"""Virtual tokens of prompt and prefix tuning: what they add to a forward pass.

PEFT adds them in its own `forward`, which returns the logits of every position. Losses are computed at supervised positions alone
(`finetune.model.head`), from the backbone, so that the same additions are made here.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, PeftType


def virtual_tokens(model: Any) -> int:
    """Number of virtual tokens before every input of ``model``; 0 where it has none or they are switched off."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning or not model.has_active_enabled_adapter:
        return 0
    return int(model.active_peft_config.num_virtual_tokens)


def forward_inputs(model: Any, ids: torch.Tensor, attention: torch.Tensor) -> tuple[dict[str, Any], int]:
    """Arguments for the causal model (or its backbone) inside ``model``, and how many positions its output has before those of ``ids``.

    Args:
        model: a causal language model, or PEFT's around one.
        ids: (b, t) int64, padded on the right: virtual tokens take the positions before them.
        attention: (b, t) int64, 1 where a token stands.
    """
    count = virtual_tokens(model)
    if not count:
        return {"input_ids": ids, "attention_mask": attention}, 0
    seen = torch.cat([attention.new_ones(len(attention), count), attention], dim=1)
    prompt = model.get_prompt(len(ids))
    if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        return {"input_ids": ids, "attention_mask": seen, "past_key_values": prompt}, 0
    embedded = model.get_base_model().get_input_embeddings()(ids)
    return {"inputs_embeds": torch.cat([prompt.to(embedded.dtype), embedded], dim=1), "attention_mask": seen}, count
