"""Checks of the differential learning rates: every group must say something, and must be able to match."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetune.config.finding import Finding
from finetune.config.hints import nearest
from finetune.config.schema import ROLES, Config, Full, Group, Lora
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
    found = _no_match_in_full(name) if isinstance(config.tuning, Full) else _no_match_in_lora(name, config.tuning)
    if found:
        why, fix, culprit = found
        yield Finding(f"group `{name}` cannot match: {why}", fix, path, culprit)


def _no_match_in_full(name: str) -> tuple[str, str, KeyPath] | None:
    if name not in ("lora-a", "lora-b", "magnitudes"):
        return None
    return "full tuning has no adapter", "remove the group, or set `tuning: {method: lora}`", ("tuning", "method")


def _no_match_in_lora(name: str, tuning: Lora) -> tuple[str, str, KeyPath] | None:
    if name == "embeddings" and tuning.embeddings == "frozen":
        return "the embeddings are frozen", "set `tuning.embeddings: lora` (or `full`), or remove the group", ("tuning", "embeddings")
    if name == "magnitudes" and not tuning.dora:
        return "only DoRA has magnitudes", "set `tuning.dora: true`, or remove the group", ("tuning", "dora")
    if name in ("norms", "lm_head"):
        return f"{name} is frozen under LoRA", "remove the group, or set `tuning: {method: full}`", ("tuning", "method")
    if (name, tuning.targets) in (("attention", "mlp"), ("mlp", "attention")):
        return f"`tuning.targets` is `{tuning.targets}`", "set `tuning.targets: all-linear`, or remove the group", ("tuning", "targets")
    return None
