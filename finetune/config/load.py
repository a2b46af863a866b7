"""A YAML file, what it extends, and overrides, as one validated configuration that remembers where every value came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from finetune.config.checks import check
from finetune.config.credentials import find_secrets, masked, secret_values
from finetune.config.dump import leaves
from finetune.config.finding import Finding
from finetune.config.layers import read_layers
from finetune.config.paths import absolute_paths
from finetune.config.repair import repaired
from finetune.config.schema import Config
from finetune.config.shipped import find_config
from finetune.config.supposed import complaints_throughout
from finetune.config.translate import Complaint, complaints
from finetune.config.tree import KeyPath, Node, dotted
from finetune.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was stated."""

    kind: Literal["default", "preset", "file", "override"]
    where: str = ""
    """`FILE:LINE`, or the override."""

    def __str__(self) -> str:
        return f"{self.kind} {self.where}".strip() if self.kind != "file" else self.where


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, the file it was read from, and the origin of each of its leaves by dotted path."""

    config: Config
    origins: dict[str, Origin]
    path: Path


def load_config(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read, merge and validate. Raises one ConfigError with every problem that was found."""
    found = find_config(path)
    try:
        tree, failed = read_layers(found, overrides)
    except ConfigError as error:
        failed = list(error.problems)
    else:
        return _validated(tree, found, failed)
    raise ConfigError.from_problems(masked(problem) for problem in failed)


def _validated(tree: Node, path: Path, failed: list[Problem]) -> Loaded:
    tree = absolute_paths(tree)
    secrets = find_secrets(tree)
    config, refused = _validate(tree)
    unwanted = {complaint.path: complaint.problem for complaint in refused} | secrets
    problems = [*unwanted.items(), *_findings(tree, config if not secrets else None, unwanted)]
    if problems or failed:
        values = secret_values(tree)
        problems.sort(key=lambda item: _position(tree, item[0]))
        raise ConfigError.from_problems(masked(problem, values) for problem in [*(problem for _, problem in problems), *failed])
    assert config is not None
    return Loaded(config, _origins(config, tree), path)


def _validate(tree: Node) -> tuple[Config | None, list[Complaint]]:
    try:
        # JSON is pydantic's strict mode for files: "16" is no number, a list is a tuple.
        return Config.model_validate_json(json.dumps(tree.plain()), strict=True), []
    except ValidationError:
        return None, complaints_throughout(tree, _refused)


def _refused(tree: Node) -> list[Complaint]:
    try:
        Config.model_validate_json(json.dumps(tree.plain()), strict=True)
    except ValidationError as error:
        return complaints(error.errors(), tree)
    return []


def _findings(tree: Node, config: Config | None, unwanted: Mapping[KeyPath, Problem]) -> Iterator[tuple[KeyPath, Problem]]:
    """What the checks of combinations find, except about values that were refused already."""
    config = config or repaired(tree, unwanted)
    if config is None:
        return
    for finding in check(config):
        if not any(_related(path, bad) for path in finding.paths for bad in unwanted):
            yield finding.paths[0], _located(finding, tree)


def _related(path: KeyPath, bad: KeyPath) -> bool:
    return path[: len(bad)] == bad or bad[: len(path)] == path


def _located(finding: Finding, tree: Node) -> Problem:
    place = tree.nearest(finding.paths[0]).heading
    return Problem(finding.what, str(place), finding.fix, place.excerpt())


def _position(tree: Node, path: KeyPath) -> tuple[int, str, int, int]:
    """Where a problem stands among the others: the file first, then presets, then overrides, each from top to bottom."""
    place = tree.nearest(path).heading
    order = ("file", "preset", "override").index(place.document.kind)
    return order, place.document.name, place.line, place.column


# --- origins -------------------------------------------------------------------------------------------------------------------------


def _origins(config: Config, tree: Node) -> dict[str, Origin]:
    return {dotted(path): _origin(path, tree) for path in leaves(config)}


def _origin(path: KeyPath, tree: Node) -> Origin:
    node = tree.find(path)
    if node is None:
        return Origin("default")
    changed = next((inner for _, inner in node.walk() if inner.at.document.kind == "override"), node)
    place = changed.heading
    if place.document.kind == "override":
        return Origin("override", f"-o {place.document.name}")
    return Origin(place.document.kind, f"{place.document.name}:{place.line}")
