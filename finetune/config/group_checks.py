"""Checks of the differential learning rates: every group must say something, and must be able to match."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetune.config.finding import Finding
from finetune.config.hints import nearest
from finetune.config.methods import facts, silent_roles
from finetune.config.schema import ROLES, Config, Full, Group, Lora, Tuning
from finetune.config.tree import KeyPath

_PLAIN_WORD = re.compile(r"[A-Za-z-]+")


def groups(config: Config) -> Iterator[Finding]:
    """Every group of `optimizer.groups` that cannot work."""
    for name, group in config.optimizer.groups.items():
        path: KeyPath = ("optimizer", "groups", name)
        yield from _rates(name, group, path)
        yield from _role(name, config, path) if name in ROLES else _pattern(name, path)


def _rates(name: str, group: Group, path: KeyPath) -> Iterator[Finding]:
    if group.lr_ratio is not None and group.learning_rate is not None:
        what = f"group `{name}` has both `lr_ratio` and `learning_rate`"
        yield Finding(what, "keep one of the two", (*path, "learning_rate"), (*path, "lr_ratio"))
    if group == Group():
        yield Finding(f"group `{name}` changes nothing", "give it `lr_ratio`, `learning_rate` or `weight_decay`, or remove it", path)


def _pattern(name: str, path: KeyPath) -> Iterator[Finding]:
    is_word = bool(_PLAIN_WORD.fullmatch(name))
    role = nearest(name, ROLES, cutoff=0.6 if is_word else 0.75)
    if role:
        fix = f"did you mean `{role}`? For a regular expression over parameter names write `.*{name}.*`"
        yield Finding(f"group `{name}` is not a role", fix, path)
    elif is_word:
        fix = f"roles: {', '.join(ROLES)}; or write a pattern over parameter names, such as `.*{name}.*`"
        yield Finding(f"group `{name}` is neither a role nor a pattern", fix, path)
    else:
        yield from bad_pattern(name, f"group `{name}`", path)


def bad_pattern(pattern: str, what: str, path: KeyPath) -> Iterator[Finding]:
    """A regular expression that does not compile."""
    try:
        re.compile(pattern)
    except re.error as error:
        position = "" if error.pos is None else f" at character {error.pos + 1}"
        yield Finding(
            f"{what} is not a valid regular expression: {error.msg}{position}", "put a backslash before a literal ( [ . * +", path
        )


def _role(name: str, config: Config, path: KeyPath) -> Iterator[Finding]:
    for role, why, fix, culprit in silent_roles(config.tuning):
        if role == name:
            yield Finding(f"group `{name}` cannot match: {why}", fix, path, culprit)
            return
    if name not in facts(config.tuning).roles:
        yield Finding(f"group `{name}` cannot match: {_foreign(name, config.tuning)}", _instead(name), path, ("tuning", "method"))


def _foreign(role: str, tuning: Tuning) -> str:
    """Why a method never trains parameters of a role."""
    if role in ("lora-a", "lora-b"):
        return "full tuning has no adapter" if isinstance(tuning, Full) else f"`{tuning.method}` has no factors A and B"
    if role == "magnitudes":
        return "full tuning has no adapter" if isinstance(tuning, Full) else "only DoRA has magnitudes"
    if not facts(tuning).roles:
        return f"`{tuning.method}` trains no part of the model itself"
    return f"{role} is frozen under {'LoRA' if isinstance(tuning, Lora) else f'`{tuning.method}`'}"


def _instead(role: str) -> str:
    method = {"lora-a": "lora", "lora-b": "lora", "magnitudes": "lora, dora: true"}.get(role, "full")
    return f"remove the group, or set `tuning: {{method: {method}}}`"
