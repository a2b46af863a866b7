"""Rank and alpha of each module's adapter, as the patterns of a configuration say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finetune.config.schema import AdaLora, Lora
from finetune.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class Strength:
    """Rank and alpha of the adapter of one module: h = Wx + s BAx with s = alpha/r (2106.09685), or alpha/sqrt(r) (2312.03732)."""

    rank: int
    alpha: float


def strengths(names: Iterable[str], tuning: Lora) -> dict[str, Strength]:
    """Rank and alpha of each module of ``names`` (full names in the base model), as the patterns of ``tuning`` say.

    A pattern is searched in the full name; the first that is found decides. ConfigError: a pattern decides for no module.
    """
    found = list(names)
    ranks, problems = _decided(found, tuning.rank_pattern, "rank_pattern")
    alphas, more = _decided(found, tuning.alpha_pattern, "alpha_pattern")
    if problems + more:
        raise ConfigError.from_problems(problems + more)
    return {name: Strength(int(ranks.get(name, tuning.rank)), float(alphas.get(name, tuning.alpha))) for name in found}


def _decided(names: list[str], patterns: Mapping[str, float], key: str) -> tuple[dict[str, float], list[Problem]]:
    """(value by module name, what is wrong with the patterns)."""
    values: dict[str, float] = {}
    problems = []
    for pattern, value in patterns.items():
        try:
            matching = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            problems.append(Problem(f"{pattern!r} is no regular expression: {error}", f"tuning.{key}", "escape dots as `\\.`"))
            continue
        new = [name for name in matching if name not in values]
        values.update(dict.fromkeys(new, value))
        if not matching:
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            what = f"no target module matches {pattern!r}"
            problems.append(Problem(what, f"tuning.{key}", f"The targets are {kinds}; a full name reads {names[0]}"))
        elif not new:
            what = f"{pattern!r} decides nothing: earlier patterns match all of its {len(matching)} modules"
            problems.append(Problem(what, f"tuning.{key}", "put it first, or remove it"))
    return values, problems


def init_rank(tuning: AdaLora) -> int:
    """Rank of every module of AdaLoRA at the start: stated, or one and a half times the target."""
    return tuning.init_rank if tuning.init_rank is not None else max(tuning.rank + 1, math.ceil(1.5 * tuning.rank))
