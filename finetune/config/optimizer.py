"""How weights are updated: the optimizer, its learning rates, and their schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune.config.section import Count, Fraction, Positive, Section

ROLES = ("embeddings", "attention", "mlp", "lm_head", "norms", "lora-a", "lora-b", "magnitudes")
"""Roles of parameters that `optimizer.groups` may name beside regular expressions."""


class Group(Section):
    """Learning rate and weight decay of one group of parameters."""

    lr_ratio: Positive | None = None
    """Multiplies `optimizer.learning_rate`. Give this or `learning_rate`, not both."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Absolute learning rate of the group."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Weight decay of the group instead of `optimizer.weight_decay`."""


class Galore(Section):
    """Gradients projected on a low-rank subspace, so that AdamW's states are small (GaLore, 2403.03507)."""

    rank: Annotated[int, Field(ge=1, le=8192)] = 128
    """Rank of the subspace of each linear weight's gradient. Weights whose shorter side is not above it are left to AdamW."""
    every_steps: Count = 200
    """Optimizer steps after which the subspace is computed anew."""
    scale: Positive = 0.25
    """Multiplies the update of projected weights."""


class Optimizer(Section):
    """The optimizer and the learning rate of every parameter."""

    method: Literal[
        "auto",
        "adamw",
        "adamw-8bit",
        "paged-adamw-8bit",
        "paged-adamw-32bit",
        "adafactor",
        "lion",
        "lion-8bit",
        "muon",
        "galore",
    ] = "adamw"
    """`paged-adamw-8bit` quarters the states and lets them spill to host memory; `adamw` is exact; `auto` takes the former on GPUs and the
    latter on CPU. `lion` wants a third to a tenth of AdamW's rate. `muon` orthogonalizes the updates of matrices and leaves the rest to
    AdamW. `galore` (AdamW on projected gradients) is for `tuning.method: full`."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-4
    """Peak learning rate. LoRA's best is about ten times that of full fine-tuning and hardly moves with rank."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Decoupled weight decay. Norms, biases and DoRA magnitudes are never decayed unless their group asks for it."""
    beta1: Fraction = 0.9
    """Decay of the first moment; muon's momentum."""
    beta2: Fraction = 0.999
    """Decay of the second moment. 0.95-0.99 for short runs, where 0.999 has not warmed up."""
    epsilon: Positive = 1e-8
    """Added to the root of the second moment."""
    groups: dict[str, Group] = {}
    """Differential learning rates: a role (`embeddings`, `attention`, `mlp`, `lm_head`, `norms`, `lora-a`, `lora-b`, `magnitudes`) or a
    regular expression over parameter names. The first match wins; a group that matches nothing is an error."""
    galore: Galore | None = None
    """Settings of `method: galore`; null: their defaults."""
    lora_plus_ratio: Annotated[float, Field(ge=1.0, le=256.0)] = 1.0
    """LoRA+ (2402.12354): learning rate of B over that of A. Composes with groups. 16 at a lower rate is the paper's choice."""


class Schedule(Section):
    """Learning rate over optimizer steps."""

    method: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Share of all steps that warm up linearly from zero. Give this or `warmup_steps`; 0.03 if neither is given."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of optimizer steps that warm up linearly from zero."""
    min_lr_ratio: Fraction = 0.0
    """Where the decay ends, as a share of the peak."""
