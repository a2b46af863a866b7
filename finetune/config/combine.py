"""The plan of `finetune combine`: several adapters of one base, and how they become one model or one adapter.

A union by `method`, each member with its own fields only. Read with the same reader as a configuration: every problem at once, with file,
line and what was probably meant.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from finetune.config import shape
from finetune.config.allowed import allowed, join
from finetune.config.hints import nearest
from finetune.config.layers import shown
from finetune.config.section import Count, Section
from finetune.config.shape import Block, Choice, Leaf, Shape
from finetune.config.tree import Document, KeyPath, Node, dotted, replace_at
from finetune.config.yaml12 import compose, read_text
from finetune.errors import ConfigError, Problem

_LINE_ENDS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")

Density = Annotated[float, Field(gt=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=-100.0, le=100.0)]
Place = Annotated[str, Field(min_length=1)]
Trim = Literal["model", "tensor"]


class PlainEntry(Section):
    """An adapter that counts like every other."""

    path: Place
    """A finished run, or an adapter directory in PEFT's format. Relative paths start at the plan's directory."""


class WeightedEntry(PlainEntry):
    """An adapter and its weight."""

    weight: Weight = 1.0
    """Factor of the adapter's update; a negative one takes away what it learned."""


class PlanBase(Section):
    """The model that the adapters belong to."""

    id: Place | None = None
    """Hub id, directory or builtin, as `model.id` of a run. Needed only where no entry is a run, which records its base."""
    revision: str | None = None
    """Commit of a hub model."""
    weights: Literal["dequantized", "original"] = "dequantized"
    """What updates are added to: the weights that the runs trained on, dequantized where they were quantized, or the weights on disk."""


class ModelOutput(Section):
    """A whole model, which plain transformers loads."""

    kind: Literal["model"]
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of the weights. `auto`: the smallest that keeps 99 % of what the combination gains on the runs' validation rows."""


class AdapterOutput(Section):
    """A plain LoRA of one rank for the same base: each combined update cut off by a singular value decomposition."""

    kind: Literal["adapter"]
    rank: Count
    """Rank of every module. The sum of the adapters' ranks loses nothing under `average` and `task-arithmetic`; the error is reported."""


Output = Annotated[ModelOutput | AdapterOutput, Field(discriminator="kind")]


class _Common(Section):
    """What every plan states."""

    base: PlanBase = PlanBase()
    """Which base, and in what form."""
    output: Output = ModelOutput(kind="model")
    """What is written."""


class Average(_Common):
    """The mean of all updates; a weight that an adapter does not touch counts as zero."""

    method: Literal["average"]
    adapters: Annotated[tuple[PlainEntry, ...], Field(min_length=1)]
    """What is combined."""


class _Weighted(_Common):
    """A plan whose adapters have weights."""

    adapters: Annotated[tuple[WeightedEntry, ...], Field(min_length=1)]
    """What is combined."""


class TaskArithmetic(_Weighted):
    """The weighted sum of all updates (2212.04089)."""

    method: Literal["task-arithmetic"]


class Ties(_Weighted):
    """Trim each update, elect a sign for each element, average the updates that agree (2306.01708)."""

    method: Literal["ties"]
    density: Density = 0.2
    """Share of each update that is kept: its elements of largest magnitude."""
    trim: Trim = "model"
    """Whether `density` is a share of the whole update, as in the paper, or of each weight, as in PEFT."""
    scale: Weight = 1.0
    """Factor of the result, the paper's lambda."""


class MagnitudePrune(_Weighted):
    """The weighted sum of what is largest in each update."""

    method: Literal["magnitude-prune"]
    density: Density
    """Share of each update that is kept: its elements of largest magnitude."""
    trim: Trim = "model"
    """Whether `density` is a share of the whole update or of each weight, as in PEFT."""


class DareLinear(_Weighted):
    """The weighted sum of updates of which a random share is dropped and the rest enlarged (2311.03099)."""

    method: Literal["dare-linear"]
    density: Density
    """Share that is kept: 1 - p of the paper. What is kept is divided by it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws. Each depends on it, the adapter's place in the list and the weight's name alone."""


class DareTies(_Weighted):
    """TIES with random dropping (2311.03099) in the place of trimming."""

    method: Literal["dare-ties"]
    density: Density
    """Share that is kept: 1 - p of the paper. What is kept is divided by it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws. Each depends on it, the adapter's place in the list and the weight's name alone."""
    scale: Weight = 1.0
    """Factor of the result."""


Plan: TypeAlias = Average | TaskArithmetic | Ties | MagnitudePrune | DareLinear | DareTies
_AnyPlan = Annotated[Plan, Field(discriminator="method")]

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


def weights_of(plan: Plan) -> tuple[float, ...]:
    """The factor of each adapter: 1/T each for an average, else as stated."""
    if isinstance(plan, Average):
        return (1.0 / len(plan.adapters),) * len(plan.adapters)
    return tuple(entry.weight for entry in plan.adapters)


def plan_schema() -> dict[str, Any]:
    """The plan as JSON Schema."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A plan of finetune combine", **_adapter().json_schema()}


def plan_shape() -> Choice:
    """The plan as plain data, for the docs and the messages."""
    found = shape.of(_AnyPlan)
    assert isinstance(found, Choice)
    return found


def load_plan(path: Path) -> Plan:
    """The validated plan in a YAML file, its paths absolute; ConfigError with every problem that was found."""
    document = Document(shown(path), tuple(_LINE_ENDS.split(text := read_text(path))), "file", path.parent.absolute())
    tree, duplicates = compose(text, document)
    if not isinstance(tree.content, dict):
        raise ConfigError("a plan is a mapping, and this is not", where=str(tree.at), fix="write `method: average` and `adapters: ...`")
    try:
        plan: Plan = _adapter().validate_json(json.dumps(_absolute(tree).plain()), strict=True)
    except ValidationError as error:
        problems = list(_problems(error.errors(), tree))
    else:
        problems = list(_contradictions(plan, tree))
        if not (problems or duplicates):
            return plan
    raise ConfigError.from_problems([*problems, *duplicates])


def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(_AnyPlan)


def _absolute(tree: Node) -> Node:
    """The tree with absolute paths: of every adapter, and of a base that is a directory (./, ../, ~/ or /)."""
    entries = tree.child("adapters")
    count = len(entries.content) if entries is not None and isinstance(entries.content, list) else 0
    places: list[KeyPath] = [("adapters", index, "path") for index in range(count)]
    base = tree.find(("base", "id"))
    if base is not None and isinstance(base.content, str) and base.content.startswith(("./", "../", "~/")):
        places.append(("base", "id"))
    for place in places:
        node = tree.find(place)
        if node is not None and isinstance(node.content, str) and node.content:
            absolute = os.path.normpath(node.at.document.directory / os.path.expanduser(node.content))  # noqa: PTH111 - only ~
            tree = replace_at(tree, place, replace(node, content=absolute))
    return tree


# --- messages ------------------------------------------------------------------------------------------------------------------------


def _contradictions(plan: Plan, tree: Node) -> Iterator[Problem]:
    """What each value allows and all of them together do not."""
    if not any(weights_of(plan)):
        yield _problem("all weights are zero: the combination would be the base", tree.nearest(("adapters",)), "give one another weight")
    if isinstance(plan.output, ModelOutput) and plan.base.revision and not plan.base.id:
        yield _problem("`base.revision` belongs to `base.id`, which is missing", tree.nearest(("base", "revision")), "add `id:`")


@dataclass(frozen=True, slots=True)
class _Complaint:
    kind: str
    path: KeyPath
    problem: Problem


def _problems(errors: Sequence[Any], tree: Node) -> Iterator[Problem]:
    found = [_complaint(error["type"], *_locate(error["loc"]), tree) for error in errors]
    strangers = {(complaint.path[:-1], str(complaint.path[-1])) for complaint in found if complaint.kind == "extra_forbidden"}
    for complaint in sorted({complaint.path: complaint for complaint in reversed(found)}.values(), key=lambda one: _line(one, tree)):
        near = [key for section, key in strangers if section == complaint.path[:-1]]
        # a missing key that is there under a wrong name was told already
        misspelt = nearest(str(complaint.path[-1]), near) or (complaint.path[-1] == "path" and set(near) & set(_FOR_PATH))
        if complaint.kind != "missing" or not misspelt:
            yield complaint.problem


def _line(complaint: _Complaint, tree: Node) -> tuple[int, int]:
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


def _complaint(kind: str, path: KeyPath, place: Shape | None, around: Shape | None, tree: Node) -> _Complaint:
    node, name = tree.nearest(path), dotted(path)
    if kind == "extra_forbidden":
        return _Complaint(kind, path, _problem(f"unknown key `{path[-1]}`{_inside(path)}", node, _meant(path, around, tree), heading=True))
    if kind == "missing":
        return _Complaint(kind, path, _missing(path, tree))
    if kind in ("union_tag_invalid", "union_tag_not_found") and isinstance(place, Choice) and isinstance(node.content, dict):
        return _no_member(path, place, node)
    if kind == "too_short":
        return _Complaint(
            kind, path, _problem(f"`{name}` is empty", node, f"such as `{_EXAMPLES.get(str(path[-1]), '...')}`", heading=True)
        )
    shown_value = json.dumps(node.content) if not isinstance(node.content, dict | list) else "a list or a mapping"
    example = _EXAMPLES.get(str(path[-1])) if path else None
    fix = f"such as `{example}`" if example else ""
    return _Complaint("value", path, _problem(f"`{name}` is {shown_value}; allowed: {allowed(place)}", node, fix))


def _no_member(path: KeyPath, place: Choice, node: Node) -> _Complaint:
    told = node.child(place.key)
    inside = (*path, place.key)
    words = join(place.members, "or")
    if told is None:
        close = nearest(place.key, node.plain_keys())
        fix = f"did you mean `{place.key}` by `{close}`?" if close else f"add `{place.key}:` with one of {words}"
        where = "" if path else "; it decides which keys a plan has"
        problem = Problem(f"`{dotted(inside)}` is missing{where}", str(node.heading), fix)
        return _Complaint("missing", inside, problem)
    meant = nearest(str(told.content).replace("_", "-"), place.members)
    fix = f"did you mean `{meant}`?" if meant else ""
    return _Complaint("value", inside, _problem(f"`{dotted(inside)}` is {json.dumps(told.plain())}; allowed: {words}", told, fix))


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
