"""The plan of `finetune combine`: several adapters of one base, and how they become one model or one adapter.

A union by `method`, each member with its own fields only. `combine_file` reads it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter

from finetune.config import shape
from finetune.config.section import Count, Section
from finetune.config.shape import Choice

Density = Annotated[float, Field(gt=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=-100.0, le=100.0)]
Place = Annotated[str, Field(min_length=1)]
Trim = Literal["model", "tensor"]


class PlainEntry(Section):
    """An adapter that counts like every other."""

    path: Place
    """A finished run, or an adapter directory in PEFT's format. Relative paths start at the plan's directory."""


class WeightedEntry(PlainEntry):
    """An adapter and its weight."""

    weight: Weight = 1.0
    """Factor of the adapter's update; a negative one takes away what it learned."""


class PlanBase(Section):
    """The model that the adapters belong to."""

    id: Place | None = None
    """Hub id, directory or builtin, as `model.id` of a run. Needed only where no entry is a run, which records its base."""
    revision: str | None = None
    """Commit of a hub model."""
    weights: Literal["dequantized", "original"] = "dequantized"
    """What updates are added to: the weights that the runs trained on, dequantized where they were quantized, or the weights on disk."""


class ModelOutput(Section):
    """A whole model, which plain transformers loads."""

    kind: Literal["model"]
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of the weights. `auto`: the smallest that keeps 99 % of what the combination gains on the runs' validation rows."""


class AdapterOutput(Section):
    """A plain LoRA of one rank for the same base: each combined update cut off by a singular value decomposition."""

    kind: Literal["adapter"]
    rank: Count
    """Rank of every module. The sum of the adapters' ranks loses nothing under `average` and `task-arithmetic`; the error is reported."""


Output = Annotated[ModelOutput | AdapterOutput, Field(discriminator="kind")]


class _Common(Section):
    """What every plan states."""

    base: PlanBase = PlanBase()
    """Which base, and in what form."""
    output: Output = ModelOutput(kind="model")
    """What is written."""


class Average(_Common):
    """The mean of all updates; a weight that an adapter does not touch counts as zero."""

    method: Literal["average"]
    adapters: Annotated[tuple[PlainEntry, ...], Field(min_length=1)]
    """What is combined."""


class _Weighted(_Common):
    """A plan whose adapters have weights."""

    adapters: Annotated[tuple[WeightedEntry, ...], Field(min_length=1)]
    """What is combined."""


class TaskArithmetic(_Weighted):
    """The weighted sum of all updates (2212.04089)."""

    method: Literal["task-arithmetic"]


class Ties(_Weighted):
    """Trim each update, elect a sign for each element, average the updates that agree (2306.01708)."""

    method: Literal["ties"]
    density: Density = 0.2
    """Share of each update that is kept: its elements of largest magnitude."""
    trim: Trim = "model"
    """Whether `density` is a share of the whole update, as in the paper, or of each weight, as in PEFT."""
    scale: Weight = 1.0
    """Factor of the result, the paper's lambda."""


class MagnitudePrune(_Weighted):
    """The weighted sum of what is largest in each update."""

    method: Literal["magnitude-prune"]
    density: Density
    """Share of each update that is kept: its elements of largest magnitude."""
    trim: Trim = "model"
    """Whether `density` is a share of the whole update or of each weight, as in PEFT."""


class DareLinear(_Weighted):
    """The weighted sum of updates of which a random share is dropped and the rest enlarged (2311.03099)."""

    method: Literal["dare-linear"]
    density: Density
    """Share that is kept: 1 - p of the paper. What is kept is divided by it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws. Each depends on it, the adapter's place in the list and the weight's name alone."""


class DareTies(_Weighted):
    """TIES with random dropping (2311.03099) in the place of trimming."""

    method: Literal["dare-ties"]
    density: Density
    """Share that is kept: 1 - p of the paper. What is kept is divided by it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws. Each depends on it, the adapter's place in the list and the weight's name alone."""
    scale: Weight = 1.0
    """Factor of the result."""


Plan: TypeAlias = Average | TaskArithmetic | Ties | MagnitudePrune | DareLinear | DareTies
_AnyPlan = Annotated[Plan, Field(discriminator="method")]


def weights_of(plan: Plan) -> tuple[float, ...]:
    """The factor of each adapter: 1/T each for an average, else as stated."""
    if isinstance(plan, Average):
        return (1.0 / len(plan.adapters),) * len(plan.adapters)
    return tuple(entry.weight for entry in plan.adapters)


def plan_schema() -> dict[str, Any]:
    """The plan as JSON Schema."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A plan of finetune combine",
        **plan_adapter().json_schema(),
    }


def plan_shape() -> Choice:
    """The plan as plain data, for the docs and the messages."""
    found = shape.of(_AnyPlan)
    assert isinstance(found, Choice)
    return found


def plan_adapter() -> TypeAdapter[Any]:
    """What validates a plan."""
    return TypeAdapter(_AnyPlan)
