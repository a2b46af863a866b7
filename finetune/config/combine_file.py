"""Reading a plan of `finetune combine`, and what is said of a wrong one: every problem at once, with file, line and what was meant."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from finetune.config import shape
from finetune.config.allowed import allowed, join
from finetune.config.combine import ModelOutput, Plan, plan_adapter, plan_shape, weights_of
from finetune.config.hints import nearest
from finetune.config.layers import shown
from finetune.config.paths import start_of
from finetune.config.shape import Block, Choice, Leaf, Shape
from finetune.config.supposed import complaints_throughout
from finetune.config.translate import Complaint
from finetune.config.tree import Document, KeyPath, Node, dotted, replace_at
from finetune.config.yaml12 import compose, read_text
from finetune.errors import ConfigError, Problem

_LINE_ENDS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_EXAMPLES = {
    "adapters": "adapters: [{path: runs/a}, {path: runs/b}]",
    "method": "method: task-arithmetic",
    "output": "output: {kind: model}",
    "rank": "rank: 32",
    "path": "path: runs/a",
    "density": "density: 0.2",
}
_FOR_PATH = ("run", "adapter", "directory", "model")
"""What others call `path`."""


def load_plan(path: Path) -> Plan:
    """The validated plan in a YAML file, its paths absolute; ConfigError with every problem that was found."""
    document = Document(shown(path), tuple(_LINE_ENDS.split(text := read_text(path))), "file", path.parent.absolute())
    tree, duplicates = compose(text, document)
    if not isinstance(tree.content, dict):
        raise ConfigError("a plan is a mapping, and this is not", where=str(tree.at), fix="write `method: average` and `adapters: ...`")
    try:
        plan: Plan = plan_adapter().validate_json(json.dumps(_absolute(tree).plain()), strict=True)
    except ValidationError:
        problems = list(_problems(tree))
    else:
        problems = list(_contradictions(plan, tree))
        if not (problems or duplicates):
            return plan
    raise ConfigError.from_problems([*problems, *duplicates])


def _absolute(tree: Node) -> Node:
    """The tree with absolute paths: of every adapter, and of a base that is a directory."""
    entries = tree.child("adapters")
    count = len(entries.content) if entries is not None and isinstance(entries.content, list) else 0
    places: list[KeyPath] = [*(("adapters", index, "path") for index in range(count)), ("base", "id")]
    for place in places:
        node = tree.find(place)
        if node is None or not isinstance(node.content, str) or not node.content:
            continue
        start: Path | None = node.at.document.directory
        if place == ("base", "id"):  # a model, as `model.id` of a configuration is
            start = start_of(("model", "id"), node.content, node.at.document.directory)
        if start is not None:
            absolute = os.path.normpath(start / os.path.expanduser(node.content))  # noqa: PTH111 - only ~
            tree = replace_at(tree, place, replace(node, content=absolute))
    return tree


# --- messages ------------------------------------------------------------------------------------------------------------------------


def _contradictions(plan: Plan, tree: Node) -> Iterator[Problem]:
    """What each value allows and all of them together do not."""
    if not any(weights_of(plan)):
        yield _problem("all weights are zero: the combination would be the base", tree.nearest(("adapters",)), "give one another weight")
    if isinstance(plan.output, ModelOutput) and plan.base.revision and not plan.base.id:
        yield _problem("`base.revision` belongs to `base.id`, which is missing", tree.nearest(("base", "revision")), "add `id:`")


def _refused(tree: Node) -> list[Complaint]:
    try:
        plan_adapter().validate_json(json.dumps(_absolute(tree).plain()), strict=True)
    except ValidationError as error:
        found = [_complaint(one["type"], *_locate(one["loc"]), tree) for one in error.errors()]
        # pydantic counts only the entries that are right
        return [complaint for complaint in found if complaint.kind != "too_short" or not tree.nearest(complaint.path).content]
    return []


def _problems(tree: Node) -> Iterator[Problem]:
    found = complaints_throughout(tree, _refused, plan_shape())
    strangers = {(complaint.path[:-1], str(complaint.path[-1])) for complaint in found if complaint.kind == "extra_forbidden"}
    for complaint in sorted({complaint.path: complaint for complaint in reversed(found)}.values(), key=lambda one: _line(one, tree)):
        near = [key for section, key in strangers if section == complaint.path[:-1]]
        # a missing key that is there under a wrong name was told already
        misspelt = nearest(str(complaint.path[-1]), near) or (complaint.path[-1] == "path" and set(near) & set(_FOR_PATH))
        if complaint.kind != "missing" or not misspelt:
            yield complaint.problem


def _line(complaint: Complaint, tree: Node) -> tuple[int, int]:
    place = tree.nearest(complaint.path).heading
    return place.line, place.column


def _locate(location: Sequence[str | int]) -> tuple[KeyPath, Shape | None, Shape | None]:
    """The path in the file of pydantic's location, the shape there, and the shape around it."""
    place: Shape | None = plan_shape()
    around: Shape | None = None
    path: KeyPath = ()
    for key in location:
        if isinstance(place, Choice):
            around = place = place.members.get(str(key))
        elif isinstance(place, Leaf):
            break
        else:
            around, place = place, shape.inner(place, key)
            path = (*path, key)
    return path, place, around


def _complaint(kind: str, path: KeyPath, place: Shape | None, around: Shape | None, tree: Node) -> Complaint:
    node, name = tree.nearest(path), dotted(path)
    if kind == "extra_forbidden":
        return Complaint(kind, path, _problem(f"unknown key `{path[-1]}`{_inside(path)}", node, _meant(path, around, tree), heading=True))
    if kind == "missing":
        return Complaint(kind, path, _missing(path, tree))
    if kind in ("union_tag_invalid", "union_tag_not_found") and isinstance(place, Choice) and isinstance(node.content, dict):
        return _no_member(path, place, node)
    if kind == "too_short":
        return Complaint(kind, path, _problem(f"`{name}` is empty", node, f"such as `{_EXAMPLES.get(str(path[-1]), '...')}`", heading=True))
    shown_value = json.dumps(node.content) if not isinstance(node.content, dict | list) else "a list or a mapping"
    example = _EXAMPLES.get(str(path[-1])) if path else None
    fix = f"such as `{example}`" if example else ""
    return Complaint("value", path, _problem(f"`{name}` is {shown_value}; allowed: {allowed(place)}", node, fix))


def _no_member(path: KeyPath, place: Choice, node: Node) -> Complaint:
    told = node.child(place.key)
    inside = (*path, place.key)
    words = join(place.members, "or")
    if told is None:
        close = nearest(place.key, node.plain_keys())
        fix = f"did you mean `{place.key}` by `{close}`?" if close else f"add `{place.key}:` with one of {words}"
        where = "" if path else "; it decides which keys a plan has"
        problem = Problem(f"`{dotted(inside)}` is missing{where}", str(node.heading), fix)
        return Complaint("missing", inside, problem)
    meant = nearest(str(told.content).replace("_", "-"), place.members)
    fix = f"did you mean `{meant}`?" if meant else ""
    return Complaint("value", inside, _problem(f"`{dotted(inside)}` is {json.dumps(told.plain())}; allowed: {words}", told, fix))


def _missing(path: KeyPath, tree: Node) -> Problem:
    holder = tree.nearest(path[:-1])
    example = _EXAMPLES.get(str(path[-1]), f"{path[-1]}: ...")
    place = str(holder.heading) if path[:-1] else holder.at.document.name
    return Problem(f"`{dotted(path)}` is missing", place, f"add `{example}`", holder.at.excerpt() if path[:-1] else "")


def _meant(path: KeyPath, around: Shape | None, tree: Node) -> str:
    """The key that was probably meant, or the methods that have it."""
    key, known = str(path[-1]), tuple(around.entries) if isinstance(around, Block) else ()
    if key in _FOR_PATH and "path" in known:
        return "an entry names its run or adapter directory with `path`"
    method = tree.child("method")
    if key == "weight" and path[0] == "adapters" and method is not None and method.content == "average":
        return "an average weighs all alike; for weights use `method: task-arithmetic`"
    homes = [tag for tag, member in plan_shape().members.items() if isinstance(member, Block) and key in member.entries]
    if homes and len(path) == 1:
        return f"`{key}` goes with {join((f'method: {home}' for home in homes), 'or')}"
    if key in ("drop", "drop_rate", "p") and "density" in known:
        return "state the share that is kept: `density` is 1 - p"
    meant = nearest(key, known)
    return f"did you mean `{meant}`?" if meant else f"known here: {join(known, 'and')}" if known else ""


def _inside(path: KeyPath) -> str:
    return f" in `{dotted(path[:-1])}`" if len(path) > 1 else ""


def _problem(what: str, node: Node, fix: str, *, heading: bool = False) -> Problem:
    place = node.heading if heading else node.at
    return Problem(what, str(place), fix, place.excerpt())
