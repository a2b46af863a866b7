"""Bottleneck adapters (Houlsby, 1902.00751; Pfeiffer, 2005.00247): y + U act(D y + d) + u on the output y of a sublayer.

U and u start at zero, so that the model starts as the base. 2 m h + m + h parameters each, for bottleneck m and hidden size h.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config.schema import Houlsby
from finetune.errors import ConfigError
from finetune.model.parts import Part

_ATTENTION = re.compile(r"(^|\.)layers?\.\d+\.(self_attn|self_attention|attention|attn)$|(^|\.)h\.\d+\.(attn|self_attention)$")
_MLP = re.compile(r"(^|\.)layers?\.\d+\.(mlp|feed_forward|ffn|block_sparse_moe)$|(^|\.)h\.\d+\.mlp$")
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Bottleneck(Part):
    """D (m, h), a nonlinearity, U (h, m), and the way around them."""

    def __init__(self, hidden: int, tuning: Houlsby) -> None:
        """D as torch draws it, U zero."""
        super().__init__()
        self.down = nn.Linear(hidden, tuning.bottleneck)
        self.act = _ACTIVATIONS[tuning.activation]()
        self.up = nn.Linear(tuning.bottleneck, hidden)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def changed(self, output: Tensor) -> Tensor:
        """``output`` (..., h) and the bottleneck's addition."""
        if not self.enabled:
            return output
        added: Tensor = self.up(self.act(self.down(output.to(self.down.weight.dtype))))
        return output + added.to(output.dtype)


def add_bottlenecks(model: Any, tuning: Houlsby) -> None:
    """Freeze ``model`` and add a bottleneck after each of its sublayers that ``tuning.placement`` names."""
    model.requires_grad_(False)
    names = [name for name, _ in model.named_modules()]
    attention, mlp = ([name for name in names if kind.search(name)] for kind in (_ATTENTION, _MLP))
    wanted = attention + mlp if tuning.placement == "both" else mlp
    if not mlp or (tuning.placement == "both" and not attention):
        missing = "MLP" if not mlp else "attention"
        raise ConfigError(
            f"no {missing} of this model's layers has a name that is known", where="tuning.method", fix="use `method: lora` with this model"
        )
    hidden = model.config.get_text_config().hidden_size
    device = model.get_input_embeddings().weight.device
    for name in names:
        if name in wanted:
            Bottleneck(hidden, tuning).to(device, torch.float32).place(model.get_submodule(name), "houlsby")
