"""Checks of single values that are of the right type and still cannot be meant: names of models and data, rates, patterns."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetune.config.finding import Finding
from finetune.config.group_checks import bad_pattern
from finetune.config.hints import nearest
from finetune.config.paths import is_path
from finetune.config.schema import Config, Lora, RegexTargets
from finetune.config.tree import KeyPath

MODELS = ("builtin:smollm2-135m",)
SOURCES = ("builtin:icd10cm",)
LARGEST_LEARNING_RATE = 0.05

_EMBEDDINGS = "remove it, and set `tuning.embeddings: lora`"
_KEYWORD = "write the keyword without a list: `targets: {}`"
_NOT_TARGETS = {
    **dict.fromkeys(("embed_tokens", "wte", "word_embeddings"), _EMBEDDINGS),
    **{word: _KEYWORD.format(word) for word in ("attention", "mlp", "all-linear")},
    "lm_head": "remove it: the output head stays frozen under LoRA in this version",
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# --- names ---------------------------------------------------------------------------------------------------------------------------


def names(config: Config) -> Iterator[Finding]:
    """Names of models, data and directories that cannot be found, wherever one looks."""
    yield from _model(config)
    validation = config.data.validation if isinstance(config.data.validation, tuple) else ()
    for part, sources in (("train", config.data.train), ("validation", validation)):
        for index, source in enumerate(sources):
            yield from _source(source.source, ("data", part, index, "source"))
    yield from _variable(config.output, ("output",))


def _model(config: Config) -> Iterator[Finding]:
    name, path = config.model.id, ("model", "id")
    directory = is_path(path, name)
    if config.model.revision and (directory or name.startswith("builtin:")):
        what = "`model.revision` pins a commit of a hub repository, and the model is " + ("a directory" if directory else "built in")
        yield Finding(what, "remove the revision", ("model", "revision"), path)
    if directory:
        return
    variable = list(_variable(name, path))
    yield from variable
    if name.startswith("builtin:"):
        yield from _builtin(name, MODELS, path)
    elif not variable and not _HUB_ID.fullmatch(name):
        fix = "write `owner/name` for the hub, or a directory that starts with `./`, `../` or `/`"
        yield Finding(f"`{name}` is neither a hub id nor a directory", fix, path)


def _source(name: str, path: KeyPath) -> Iterator[Finding]:
    yield from _variable(name, path)
    if name.startswith("builtin:"):
        yield from _builtin(name, SOURCES, path)
    elif name.startswith("hub:") or "://" in name:
        what = "data from the hub is not available in this version" if name.startswith("hub:") else "web addresses are never fetched"
        yield Finding(f"`{name}`: {what}", "download it, for example with `hf download --repo-type dataset`, and name the file", path)


def _builtin(name: str, known: tuple[str, ...], path: KeyPath) -> Iterator[Finding]:
    if name not in known:
        meant = nearest(name, known, cutoff=0.5)
        yield Finding(f"there is no `{name}`", f"did you mean `{meant}`?" if meant else f"there is {', '.join(known)}", path)


def _variable(value: str, path: KeyPath) -> Iterator[Finding]:
    if "$" in value:
        fix = "write the value out, or override it: `-o " + ".".join(map(str, path)) + "=...`"
        yield Finding(f"`{value}`: environment variables are not read in a configuration", fix, path)


# --- numbers and patterns ------------------------------------------------------------------------------------------------------------


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
            what = f"a learning rate of {rate:g} destroys the model: AdamW moves every weight by about that much in each step"
            fix = f"LoRA's best lies between 1e-5 and 1e-3, that of full tuning at a tenth; the limit is {LARGEST_LEARNING_RATE:g}"
            yield Finding(what, fix, *paths)


def targets(config: Config) -> Iterator[Finding]:
    """Adapters cannot go to what is not a hidden linear layer, and patterns must compile."""
    if not isinstance(config.tuning, Lora):
        return
    wanted = config.tuning.targets
    if isinstance(wanted, RegexTargets):
        yield from bad_pattern(wanted.regex, "`tuning.targets.regex`", ("tuning", "targets", "regex"))
    elif isinstance(wanted, tuple):
        for index, name in enumerate(wanted):
            if name in _NOT_TARGETS:
                yield Finding(f"no adapter can go to `{name}`", _NOT_TARGETS[name], ("tuning", "targets", index))
