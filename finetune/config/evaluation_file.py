"""A file that says what to measure: an `evaluation` section alone, for `finetune eval --config`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from finetune.config.credentials import find_secrets, masked, secret_values
from finetune.config.evaluation_checks import evaluation_tasks
from finetune.config.layers import read_layers
from finetune.config.overrides import apply_overrides
from finetune.config.paths import absolute_paths
from finetune.config.schema import Config, Evaluation
from finetune.config.supposed import complaints_throughout
from finetune.config.translate import Complaint, complaints
from finetune.config.tree import Document, KeyPath, Node, Place
from finetune.errors import ConfigError, Problem

_SECTION = "evaluation"
_REST = {
    "model": {"id": "owner/name"},
    "tuning": {"method": "lora"},
    "data": {"train": [{"source": "/train.jsonl"}]},
    "output": "runs/name",
}
"""What a whole configuration needs besides."""


def load_evaluation(path: Path | None, overrides: Sequence[str] = ()) -> Evaluation:
    """The validated `evaluation` section of a YAML file, or the default one, with overrides; ConfigError with every problem."""
    if path is None:
        tree, failed = apply_overrides(Node({}, Place(Document("the default evaluation", (), "file", Path.cwd()))), overrides)
    else:
        tree, failed = read_layers(path, overrides)
    tree = absolute_paths(tree)
    secrets = find_secrets(tree)
    found = [*_strangers(tree), *secrets.items()]
    known = Node({_SECTION: section}, tree.at) if (section := tree.child(_SECTION)) is not None else Node({}, tree.at)
    try:
        config = Config.model_validate_json(json.dumps(_REST | _plain(known)), strict=True)
    except ValidationError:
        found += [(complaint.path, complaint.problem) for complaint in complaints_throughout(known, _refused)]
    else:
        found += [(finding.paths[0], _located(finding.what, finding.fix, finding.paths[0], tree)) for finding in evaluation_tasks(config)]
    if found or failed:
        values = secret_values(tree)
        found.sort(key=lambda item: _position(tree, item[0]))
        raise ConfigError.from_problems(masked(problem, values) for problem in [*(problem for _, problem in found), *failed])
    return config.evaluation


def _refused(tree: Node) -> list[Complaint]:
    try:
        Config.model_validate_json(json.dumps(_REST | _plain(tree)), strict=True)
    except ValidationError as error:
        return complaints(error.errors(), tree)
    return []


def _position(tree: Node, path: KeyPath) -> tuple[str, int, int]:
    place = tree.nearest(path).heading
    return place.document.kind, place.line, place.column


def _plain(tree: Node) -> dict[str, object]:
    plain = tree.plain()
    assert isinstance(plain, dict)
    return dict(plain)


def _strangers(tree: Node) -> list[tuple[KeyPath, Problem]]:
    """Sections that say nothing about measuring."""
    assert isinstance(tree.content, dict)
    fix = "such a file holds `evaluation:` alone; what was trained, and how, is the run's own"
    return [
        ((key,), Problem(f"`{key}` does not belong into a file for --config", str(node.heading), fix, node.heading.excerpt()))
        for key, node in tree.content.items()
        if key != _SECTION
    ]


def _located(what: str, fix: str, path: KeyPath, tree: Node) -> Problem:
    place = tree.nearest(path).heading
    return Problem(what, str(place), fix, place.excerpt())
