"""Checks of the optimizer: with the tuning method, and of keys that it would not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from finetune.config.finding import Finding
from finetune.config.methods import FACTS, facts
from finetune.config.schema import Config, Full, Optimizer
from finetune.config.tree import KeyPath

LARGEST_LEARNING_RATE = 0.05

UNREAD: Mapping[str, Mapping[str, str]] = {
    "adafactor": {
        "beta1": "it keeps no first moment",
        "beta2": "its second moment decays with the step's number",
        "epsilon": "its own constants bound the update",
    },
    "lion": {"epsilon": "its update is a sign, which nothing divides"},
    "lion-8bit": {"epsilon": "its update is a sign, which nothing divides"},
}
"""`optimizer.method` -> keys of `optimizer` that it has no use for -> why. Values that differ from the default are errors."""


def unread(config: Config) -> Iterator[Finding]:
    """Values that the chosen optimizer would ignore."""
    method = config.optimizer.method
    for key, why in UNREAD.get(method, {}).items():
        if getattr(config.optimizer, key) != Optimizer.model_fields[key].default:
            yield Finding(
                f"`{method}` does not read `optimizer.{key}`: {why}",
                "remove it, or set `optimizer.method: adamw`",
                ("optimizer", key),
                ("optimizer", "method"),
            )


def galore(config: Config) -> Iterator[Finding]:
    """GaLore projects the gradients of whole weights."""
    stated, method = config.optimizer.galore is not None, config.optimizer.method
    if stated and method != "galore":
        yield Finding(
            f"`optimizer.galore` goes with `method: galore`, and `optimizer.method` is `{method}`",
            "set `optimizer.method: galore`, or remove `galore`",
            ("optimizer", "galore"),
            ("optimizer", "method"),
        )
    if method == "galore" and not isinstance(config.tuning, Full):
        yield Finding(
            f"`optimizer.method: galore` projects the gradients of whole weights, which `tuning.method: {config.tuning.method}` freezes",
            "set `tuning: {method: full}`, or `optimizer.method: adamw`",
            ("optimizer", "method"),
            ("tuning", "method"),
        )


def muon(config: Config) -> Iterator[Finding]:
    """Muon would do nothing where only vectors train, or virtual tokens, which are embeddings."""
    if config.optimizer.method == "muon" and not facts(config.tuning).matrices:
        yield Finding(
            f"`optimizer.method: muon` orthogonalizes updates of matrices, and `tuning.method: {config.tuning.method}` trains vectors only",
            "set `optimizer.method: adamw`",
            ("optimizer", "method"),
            ("tuning", "method"),
        )


def lora_plus(config: Config) -> Iterator[Finding]:
    """LoRA+ needs two factors."""
    if config.optimizer.lora_plus_ratio == 1 or facts(config.tuning).lora_plus:
        return
    method = config.tuning.method
    factors = " or ".join(
        f"`{name}`" for kind, row in FACTS.items() if row.lora_plus for name in get_args(kind.model_fields["method"].annotation)
    )
    yield Finding(
        f"`optimizer.lora_plus_ratio` sets the rate of B over that of A, and "
        f"{'full tuning has neither' if isinstance(config.tuning, Full) else f'it is for {factors}, not `{method}`'}",
        "remove it, or set `tuning: {method: lora}`",
        ("optimizer", "lora_plus_ratio"),
        ("tuning", "method"),
    )


def learning_rates(config: Config) -> Iterator[Finding]:
    """Peak rates that destroy a model, for AdamW moves every weight by about the learning rate in each step."""
    base = config.optimizer.learning_rate
    peaks: list[tuple[float, tuple[KeyPath, ...]]] = [(base, (("optimizer", "learning_rate"),))]
    if base * config.optimizer.lora_plus_ratio > LARGEST_LEARNING_RATE >= base:
        peaks.append((base * config.optimizer.lora_plus_ratio, (("optimizer", "lora_plus_ratio"), ("optimizer", "learning_rate"))))
    for name, group in config.optimizer.groups.items():
        path = ("optimizer", "groups", name)
        if group.learning_rate is not None:
            peaks.append((group.learning_rate, ((*path, "learning_rate"),)))
        elif group.lr_ratio is not None and base <= LARGEST_LEARNING_RATE:
            peaks.append((base * group.lr_ratio, ((*path, "lr_ratio"), ("optimizer", "learning_rate"))))
    for rate, paths in peaks:
        if rate > LARGEST_LEARNING_RATE:
            what = f"a learning rate of {rate:g} destroys the model: the optimizer moves every weight by about that much in each step"
            fix = f"LoRA's best lies between 1e-5 and 1e-3, that of full tuning at a tenth; the limit is {LARGEST_LEARNING_RATE:g}"
            yield Finding(what, fix, *paths)
