"""pydantic's errors as problems a user can act on: the line, what is allowed, and what was probably meant."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config import hints, shape
from finetune.config.allowed import allowed, join, words
from finetune.config.shape import Block, Choice, Items, Leaf, Shape, Table
from finetune.config.tree import KeyPath, Node, Plain, dotted
from finetune.errors import Problem

_CONTAINERS = frozenset({"model_type", "model_attributes_type", "dict_type", "tuple_type"})

_REQUIRED = frozenset(name for name, entry in shape.root().entries.items() if entry.required)

_EXAMPLES = {
    "model": "model: {id: meta-llama/Meta-Llama-3-8B}",
    "model.id": "id: meta-llama/Meta-Llama-3-8B",
    "tuning": "tuning: {method: lora}",
    "tuning.method": "method: lora",
    "data": "data: {train: [{source: data/train.jsonl}]}",
    "data.train": "train: [{source: data/train.jsonl}]",
    "data.train.0": "{source: data/train.jsonl}",
    "data.train.0.source": "source: data/train.jsonl",
    "data.train.0.columns": "columns: {question: Frage, answer: Antwort}",
    "model.new_tokens": "new_tokens: ['[<note>]']",
    "tuning.rank_pattern": "rank_pattern: {'layers[.]0[.]': 8}",
    "tuning.alpha_pattern": "alpha_pattern: {'layers[.]0[.]': 8}",
    "tuning.targets": "targets: {spectrum: 0.5}",
    "optimizer.galore": "galore: {rank: 128}",
    "data.validation": "validation: {fraction: 0.02}",
    "data.validation.fraction": "fraction: 0.02",
    "optimizer.groups.NAME": "embeddings: {lr_ratio: 0.1}",
    "optimizer.groups": "groups: {embeddings: {lr_ratio: 0.1}}",
    "evaluation.tasks": "tasks: [{task: loss}, {task: forgetting}]",
    "evaluation.tasks.0": "{task: loss}",
    "evaluation.tasks.0.data": "data: {source: rows.jsonl}",
    "evaluation.tasks.0.tasks": "tasks: [arc_easy]",
    "train.evaluate": "evaluate: {every_steps: 100}",
    "train.checkpoint": "checkpoint: {every_steps: 100, keep: 3}",
    "train.early_stopping": "early_stopping: {patience: 3}",
    "tracking": "tracking: {tensorboard: true}",
    "output": "output: runs/my-run",
}


@dataclass(frozen=True, slots=True)
class Complaint:
    """One thing that the schema refuses, in terms of the tree."""

    kind: str
    path: KeyPath
    problem: Problem


def complaints(errors: Sequence[Any], tree: Node) -> list[Complaint]:
    """One complaint for each place that pydantic's ``errors`` are about, in the order of the file."""
    plain = tree.plain()
    found: dict[KeyPath, Complaint] = {}
    for error in errors:
        for complaint in _complaints(error, tree, plain):
            found.setdefault(complaint.path, complaint)
    return [complaint for complaint in found.values() if not _is_misspelt(complaint, found)]


def _is_misspelt(missing: Complaint, found: Mapping[KeyPath, Complaint]) -> bool:
    """Whether a missing key is there under a wrong name, which another complaint is about already."""
    if missing.kind != "missing":
        return False
    section, key = missing.path[:-1], str(missing.path[-1])
    strangers = [str(path[-1]) for path, complaint in found.items() if complaint.kind == "extra_forbidden" and path[:-1] == section]
    # `targets: {spectrum: 0.5}` is another kind of targets, not a regex that lacks its key.
    return bool(hints.nearest(key, strangers, cutoff=0.5)) or (section == ("tuning", "targets") and bool(strangers))


def _complaints(error: Any, tree: Node, plain: Plain) -> Iterator[Complaint]:
    kind: str = error["type"]
    path, place = _locate(error["loc"])
    node = tree.find(path)
    if kind == "missing":
        yield Complaint(kind, path, _missing(path, tree))
    elif kind == "extra_forbidden":
        yield Complaint(kind, path, _unknown_key(path, tree, plain))
    elif kind in ("union_tag_invalid", "union_tag_not_found") and isinstance(place, Choice):
        yield _no_member(path, place, tree)
    elif node is None or (kind == "too_short" and node.content):
        return  # pydantic counts only the entries that are right
    elif kind in _CONTAINERS or isinstance(place, (Block, Table)):
        yield Complaint("container", path, _wrong_container(path, node, place))
    else:
        yield Complaint("value", path, _wrong_value(path, node, place))


def _locate(location: Sequence[str | int]) -> tuple[KeyPath, Shape | None]:
    """The path in the file, and its shape, of pydantic's location, which also names the union members on the way."""
    place: Shape | None = shape.root()
    path: KeyPath = ()
    for key in location:
        if isinstance(place, Choice):
            place = place.members.get(str(key))
        elif isinstance(place, Leaf):
            break  # the rest says which of several scalar types was tried
        else:
            place = shape.inner(place, key)
            path = (*path, key)
    return path, place


def _problem(what: str, node: Node, fix: str, *, heading: bool = False) -> Problem:
    place = node.heading if heading else node.at
    return Problem(what, str(place), fix, place.excerpt())


def _example(path: KeyPath) -> str:
    generic = tuple("NAME" if path[:2] == ("optimizer", "groups") and depth == 2 else key for depth, key in enumerate(path))
    text = dotted(tuple(0 if isinstance(key, int) else key for key in generic))
    return _EXAMPLES.get(text) or _EXAMPLES.get(text.replace("data.validation.0", "data.train.0"), "")


def _missing(path: KeyPath, tree: Node) -> Problem:
    holder = tree.nearest(path[:-1])
    example = _example(path)
    fix = f"add `{example}`" if example else f"add `{path[-1]}`"
    if path[-1] == "revision":  # required where a dataset of the hub is named
        fix += ": the 40 hexadecimal digits of a commit of the dataset, so that what is trained on cannot change"
    if path == ("tuning",):
        fix += ", or take a recipe: `extends: domain-knowledge`"
    if len(path) == 1:
        return Problem(f"`{dotted(path)}` is missing", holder.at.document.name, fix)
    return _problem(f"`{dotted(path)}` is missing", holder, fix, heading=True)


def _unknown_key(path: KeyPath, tree: Node, plain: Plain) -> Problem:
    section = f"in `{dotted(path[:-1])}`" if len(path) > 1 else "at the top level"
    return _problem(f"unknown key `{path[-1]}` {section}", tree.nearest(path), hints.for_key(path, plain), heading=True)


def _no_member(path: KeyPath, place: Choice, tree: Node) -> Complaint:
    node = tree.nearest(path)
    if not isinstance(node.content, dict):
        return Complaint("container", path, _wrong_container(path, node, place))
    told = node.child(place.key)
    if told is None:
        return Complaint("missing", (*path, place.key), _untold(path, place, node))
    inside = (*path, place.key)
    what = f"`{dotted(inside)}` is {in_a_sentence(told)}; allowed: {_words(place)}"
    return Complaint("value", inside, _problem(what, told, hints.for_value(inside, told.plain(), place)))


def _untold(path: KeyPath, place: Choice, node: Node) -> Problem:
    close = hints.nearest(place.key, node.plain_keys(), cutoff=0.7)
    misspelt = node.child(close) if close else None
    if misspelt:
        return _problem(f"unknown key `{close}` in `{dotted(path)}`", misspelt, f"did you mean `{place.key}`?", heading=True)
    what = f"`{dotted((*path, place.key))}` is missing: it decides which keys `{dotted(path)}` has"
    return _problem(what, node, f"add `{place.key}:` with one of {_words(place)}", heading=True)


def _words(place: Choice) -> str:
    return join(place.members, "or")


def _wrong_container(path: KeyPath, node: Node, place: Shape | None) -> Problem:
    name = f"`{dotted(path)}`"
    wanted = "a list" if isinstance(place, Items) else "a mapping of keys"
    if node.content is None:
        fix = "indent what belongs under it" + (", or remove the key to get the defaults" if path[0] not in _REQUIRED else "")
        example = _example(path)
        return _problem(f"{name} has nothing under it", node, f"{fix}, such as `{example}`" if example else fix, heading=True)
    return _problem(f"{name} is {in_a_sentence(node)}; it must be {wanted}", node, _container_fix(path, node, place))


def _container_fix(path: KeyPath, node: Node, place: Shape | None) -> str:
    """What to write where the user gave one word instead of a section, or one entry instead of a list."""
    key = f"{path[-1]}: " if isinstance(path[-1], str) else ""
    if isinstance(node.content, str):
        if isinstance(place, Choice) and place.key and node.content not in place.members:
            hint = hints.for_value((*path, place.key), node.content, place)
            return (f"{hint}; " if hint else "") + f"write `{key}{{{place.key}: ...}}` with one of {_words(place)}"
        if home := _home(node.content, place):
            return f"write `{key}{{{home}}}`"
    if isinstance(place, Items) and isinstance(node.content, (str, dict)):
        entry = f"{{{home}}}" if isinstance(node.content, str) and (home := _home(node.content, place.item)) else "..."
        return f"write a list: `{key}[{entry}]`"
    example = _example(path)
    return f"such as `{example}`" if example else f"it is {allowed(place)}"


def _home(text: str, place: Shape | None) -> str:
    """The entry of a section that a single word was probably meant for, such as ``method: cosine``."""
    if isinstance(place, Choice):
        if place.key:
            return f"{place.key}: {text}" if text in place.members else ""
        place = list(place.members.values())[-1]
    if not isinstance(place, Block):
        return ""
    if text in place.entries:
        return f"{text}: true"
    first, entry = next(iter(place.entries.items()))
    takes_text = isinstance(entry.shape, Leaf) and (entry.shape.annotation is str or text in words(entry.shape))
    return f"{first}: {text}" if takes_text else ""


def _wrong_value(path: KeyPath, node: Node, place: Shape | None) -> Problem:
    if isinstance(place, Items):
        return _problem(f"`{dotted(path)}` is {in_a_sentence(node)}; it needs at least one entry", node, _container_fix(path, node, place))
    what = f"`{dotted(path)}` is {in_a_sentence(node)}; allowed: {allowed(place)}"
    return _problem(what, node, hints.for_value(path, node.plain(), place) or hints.from_the_schema(path))


def in_a_sentence(node: Node) -> str:
    """A value in a sentence."""
    content = node.content
    if isinstance(content, dict):
        return "a mapping"
    if isinstance(content, list):
        return "a list" if content else "an empty list"
    if isinstance(content, str):
        return f'the text "{content if len(content) <= 40 else content[:37] + "..."}"' if content else "empty"
    return json.dumps(content)
