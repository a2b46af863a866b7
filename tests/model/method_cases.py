"""The methods of the `tuning` union on tiny models: how each is configured, attached and trained for a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import TypeAdapter

from finetune.config.schema import EightBit, FourBit, NoQuantization, Quantization, Tuning
from finetune.model.adalora import add_penalty, plan_ranks, update_ranks
from finetune.model.adapters import attach, trainable
from finetune.model.head import target_losses
from finetune.model.load import load_base
from finetune.model.methods import Given

Llama = Callable[..., Path]
CPU = torch.device("cpu")
PLAIN = NoQuantization()
BASES = {"none": PLAIN, "nf4": FourBit(method="nf4"), "int8": EightBit(method="int8")}
IDS = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(1))
ROWS = (IDS, torch.ones_like(IDS), torch.ones_like(IDS, dtype=torch.bool))

HIDDEN, INNER, LAYERS, KEYS = 64, 128, 2, 32
LINEAR = (("q", 64, 64), ("k", 64, 32), ("v", 64, 32), ("o", 64, 64), ("gate", 64, 128), ("up", 64, 128), ("down", 128, 64))
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "lora": ({"rank": 4}, LAYERS * sum(4 * (i + o) for _, i, o in LINEAR)),
    "tied-lora": ({"rank": 4}, sum(4 * i for _, i, _ in LINEAR) + LAYERS * sum(4 * o for _, _, o in LINEAR)),
    "tied-lora-b": (
        {"method": "tied-lora", "rank": 4, "share": "b"},
        LAYERS * sum(4 * i for _, i, _ in LINEAR) + sum(4 * o for *_, o in LINEAR),
    ),
    "adalora": ({"rank": 4, "init_rank": 6}, LAYERS * sum(6 * (i + o + 1) for _, i, o in LINEAR)),
    "vera": ({"rank": 16}, LAYERS * sum(16 + o for *_, o in LINEAR)),
    "ia3": ({}, LAYERS * (2 * KEYS + INNER)),
    "prompt": ({"tokens": 5}, 5 * HIDDEN),
    "prefix": ({"tokens": 5}, 5 * LAYERS * 2 * KEYS),
    "norm": ({}, HIDDEN * (2 * LAYERS + 1)),
    "houlsby": ({"bottleneck": 8}, LAYERS * 2 * (2 * 8 * HIDDEN + 8 + HIDDEN)),
}
STARTS_ELSEWHERE = ("prompt", "prefix")
"""Methods that have no start at which they are nothing: their tokens are there from the first step."""


def section(name: str) -> Tuning:
    fields, _ = METHODS[name]
    tuning: Tuning = TypeAdapter(Tuning).validate_python({"method": name} | fields)
    return tuning


def base(llama: Llama, quantization: Quantization = PLAIN, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(llama(dtype=torch.bfloat16), quantization, dtype, CPU)


def attached(llama: Llama, name: str, quantization: Quantization = PLAIN, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = attach(base(llama, quantization, dtype), section(name), Given(seed=3))
    if name == "adalora":
        plan_ranks(model, section(name), 3)
    return model


def train(model: Any, steps: int = 3, begin: int = 0) -> Any:
    model.train()
    adam = torch.optim.SGD(trainable(model).values(), lr=0.05)
    for step in range(begin, begin + steps):
        target_losses(model, *ROWS).mean().backward()
        if isinstance(model, PeftModel) and model.active_peft_config.peft_type == "ADALORA":
            add_penalty(model)
        adam.step()
        if isinstance(model, PeftModel) and model.active_peft_config.peft_type == "ADALORA":
            update_ranks(model, step + 1)
        adam.zero_grad()
    return model.eval()


@torch.no_grad()
def losses(model: Any) -> torch.Tensor:
    return target_losses(model.eval(), *ROWS)
