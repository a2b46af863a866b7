"""Checks of names of models, data and directories that cannot be found, wherever one looks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetune.config.finding import Finding
from finetune.config.hints import nearest
from finetune.config.paths import is_path
from finetune.config.schema import Config
from finetune.config.tree import KeyPath

MODELS = ("builtin:smollm2-135m",)
SOURCES = ("builtin:icd10cm",)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
    elif "://" in name:
        fix = "download the file and name it; a dataset of the hub is `hub:owner/name`"
        yield Finding(f"`{name}`: web addresses are never fetched", fix, path)


def _builtin(name: str, known: tuple[str, ...], path: KeyPath) -> Iterator[Finding]:
    if name not in known:
        meant = nearest(name, known, cutoff=0.5)
        yield Finding(f"there is no `{name}`", f"did you mean `{meant}`?" if meant else f"there is {', '.join(known)}", path)


def _variable(value: str, path: KeyPath) -> Iterator[Finding]:
    if "$" in value:
        fix = "write the value out, or override it: `-o " + ".".join(map(str, path)) + "=...`"
        yield Finding(f"`{value}`: environment variables are not read in a configuration", fix, path)
