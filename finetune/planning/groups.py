"""Parameter groups: which learning rate, weight decay and update rule each trainable tensor gets, by its name and shape alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from finetune.config.schema import ROLES, Galore, Group, Optimizer
from finetune.errors import ConfigError, Problem
from finetune.planning.targets import roles_of

REST = "(rest)"
"""Name of the group of parameters that no entry of `optimizer.groups` matches."""

Rule = Literal["own", "adamw"]
_OF_VECTORS = ("norms", "magnitudes")
"""Roles of vectors and scales alone: a decay that is stated for one of them is meant for them."""


class Shaped(Protocol):
    """A parameter of torch, or what stands for one in a plan."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sides."""


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share a learning rate, a weight decay and an update rule."""

    name: str
    learning_rate: float
    """Peak rate; the schedule multiplies it."""
    weight_decay: float
    names: tuple[str, ...]
    parameters: int
    """Number of scalars."""
    rule: Rule = "own"
    """`own`: the optimizer's. `adamw`: what muon and galore leave to AdamW."""

    def summary(self) -> dict[str, Any]:
        """For plan.json and the table: everything but the names."""
        return {key: value for key, value in asdict(self).items() if key not in ("names", "rule")} | {"tensors": len(self.names)}


@dataclass(frozen=True, slots=True)
class _Key:
    """What makes two parameters of one group: the entry that matched, and all that changes how they are updated."""

    entry: str
    is_b: bool
    decays: bool
    rule: Rule


def assign_groups(parameters: Mapping[str, Shaped], optimizer: Optimizer) -> list[ParameterGroup]:
    """Put each trainable parameter into exactly one group; the first matching entry wins.

    LoRA+ (2402.12354) multiplies the rate of every B within its group. Norms, biases and magnitudes (vectors, and what scales rows or
    columns) are not decayed unless a decay is stated for a group of them alone: `norms`, `magnitudes`, or a pattern that matches nothing
    else. ``optimizer.method`` is resolved, not `auto`. Raises ConfigError for an entry that matches nothing, and for a method that none of
    the parameters is fit for.
    """
    members: dict[_Key, list[str]] = {}
    asked = {entry for entry, group in optimizer.groups.items() if group.weight_decay is not None and _of_vectors(entry, parameters)}
    for name, parameter in parameters.items():
        entry = next((key for key in optimizer.groups if _matches(key, name)), REST)
        is_b = optimizer.lora_plus_ratio != 1.0 and "lora-b" in roles_of(name)
        decays = entry in asked or not _is_vector(name, parameter)
        key = _Key(entry, is_b, decays, _rule(optimizer, name, parameter))
        members.setdefault(key, []).append(name)
    _require_matches(parameters, optimizer, {key.entry for key in members})
    _require_own(members, optimizer)
    order = {entry: position for position, entry in enumerate([*optimizer.groups, REST])}
    ordered = sorted(members, key=lambda key: (order[key.entry], key.rule != "own", key.is_b, not key.decays))
    return [_group(key, members[key], parameters, optimizer) for key in ordered]


def _group(key: _Key, names: list[str], parameters: Mapping[str, Shaped], optimizer: Optimizer) -> ParameterGroup:
    stated = optimizer.groups.get(key.entry, Group())
    rate = stated.learning_rate if stated.learning_rate is not None else optimizer.learning_rate * (stated.lr_ratio or 1.0)
    decay = optimizer.weight_decay if stated.weight_decay is None else stated.weight_decay
    parts = [key.entry + (" B" if key.is_b else ""), "" if key.decays else "no decay", "" if key.rule == "own" else "AdamW"]
    return ParameterGroup(
        name=", ".join(filter(None, parts)),
        learning_rate=rate * (optimizer.lora_plus_ratio if key.is_b else 1.0),
        weight_decay=decay if key.decays else 0.0,
        names=tuple(names),
        parameters=sum(math.prod(parameters[name].shape) for name in names),
        rule=key.rule,
    )


def _matches(entry: str, name: str) -> bool:
    return entry in roles_of(name) if entry in ROLES else re.search(entry, name) is not None


def _of_vectors(entry: str, parameters: Mapping[str, Shaped]) -> bool:
    """Whether ``entry`` matches vectors alone, so that a decay stated for it is meant for them."""
    if entry in ROLES:
        return entry in _OF_VECTORS
    return all(_is_vector(name, parameter) for name, parameter in parameters.items() if _matches(entry, name))


def _is_vector(name: str, parameter: Shaped) -> bool:
    # AdaLoRA's and IA3's scales are columns and rows of one element; decay would pull IA3's from one to zero
    return len(parameter.shape) < 2 or bool(set(_OF_VECTORS) & set(roles_of(name)))


def _rule(optimizer: Optimizer, name: str, parameter: Shaped) -> Rule:
    """Muon and GaLore are made for the matrices of hidden layers; embeddings, head and vectors get AdamW."""
    if optimizer.method not in ("muon", "galore"):
        return "own"
    if len(parameter.shape) != 2 or {"embeddings", "lm_head", "magnitudes"} & set(roles_of(name)):
        return "adamw"
    rank = (optimizer.galore or Galore()).rank if optimizer.method == "galore" else 0
    return "own" if min(parameter.shape) > rank else "adamw"


def _require_own(members: Mapping[_Key, list[str]], optimizer: Optimizer) -> None:
    if not any(key.rule == "own" for key in members):
        raise ConfigError(
            f"{optimizer.method} finds no hidden matrix among the trainable parameters that it could update its own way",
            where="optimizer.method",
            fix="lower optimizer.galore.rank, or use adamw" if optimizer.method == "galore" else "use adamw",
        )


def _require_matches(parameters: Mapping[str, Shaped], optimizer: Optimizer, used: set[str]) -> None:
    available = sorted({role for name in parameters for role in roles_of(name)})
    problems = []
    for entry in optimizer.groups:
        if entry in used:
            continue
        taken = any(_matches(entry, name) for name in parameters)
        what = "matches only parameters that earlier groups took" if taken else "matches no trainable parameter"
        known = (
            f"roles that match here: {', '.join(available)}" if available else f"a trainable parameter is called {next(iter(parameters))}"
        )
        fix = "put it before them" if taken else f"{known}; or a regular expression over parameter names"
        problems.append(Problem(f"the group {entry!r} {what}", f"optimizer.groups.{entry}", fix))
    if problems:
        raise ConfigError.from_problems(problems)
