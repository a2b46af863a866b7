"""LoRA with one factor for all layers of a module type (after Tied-LoRA, 2311.09578): h = W_l x + s B_l A x, or s B A_l x.

PEFT's LoRA modules are built as usual, and then the weights of one factor become one parameter: it is counted, stepped and decayed once,
and its gradient is the sum over the layers. Files hold a copy for each layer, so that they are those of a plain LoRA, which PEFT loads.
"""

from __future__ import annotations

from typing import Any

from finetune.config.schema import Lora, TiedLora

_ADAPTER = "default"


def as_lora(tuning: TiedLora) -> Lora:
    """The plain LoRA of the same rank, scale and targets."""
    return Lora(method="lora", **tuning.model_dump(include={"rank", "alpha", "scaling", "dropout", "targets"}))


def tie(model: Any, tuning: TiedLora) -> None:
    """Let the layers of ``model`` (PEFT's) share a factor: those of one module type whose factor has one shape."""
    side = f"lora_{tuning.share.upper()}"
    first: dict[tuple[str, tuple[int, ...]], Any] = {}
    for name, module in model.get_base_model().named_modules():
        factors = getattr(module, side, None)
        if factors is None or _ADAPTER not in factors:
            continue
        weight = factors[_ADAPTER].weight
        factors[_ADAPTER].weight = first.setdefault((name.rpartition(".")[2], tuple(weight.shape)), weight)
