"""Property tests over every leaf of the schema: no misspelt key, wrong type or value out of range gets through (pitfall A7)."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.config.dump import dump_config, show_config
from finetune.config.schema import ChoicesTask, Full, GenerateTask, HubSource
from finetune.config.shape import Block, Choice, Entry, Items, Leaf, Shape, Table, entries, root
from finetune.config.tree import KeyPath, dotted

KEY, VALUE = "KEYKEYKEY", "VALUEVALUEVALUE"
TABLES = ("rank_pattern", "alpha_pattern", "columns")
"""Leaves that are mappings with names of the user's."""

EXAMPLES: dict[str, Any] = {
    "id": "owner/name",
    "revision": "0" * 40,
    "regex": ".*_proj",
    "source": "/data/train.jsonl",
    "fraction": 0.25,
    "lr_ratio": 0.5,
    "learning_rate": 1e-4,
    "weight_decay": 0.25,
    "warmup_ratio": 0.25,
    "warmup_steps": 3,
    "max_steps": 100,
    "every_steps": 7,
    "output": "runs/other",
    "targets": "mlp",
    "chapters": ["A", "B"],
    "new_tokens": ["[<note>]", "[</note>]"],
    "spectrum": 0.5,
    "subset": "all",
    "text": "Answer the question.",
    "columns": {"question": "Frage"},
    "rank_pattern": {"layers[.]0[.]": 8},
    "alpha_pattern": {"layers[.]0[.]": 8.0},
    "init_rank": 12,
    "tasks": ["arc_easy"],
    "metrics": ["exact-match"],
    "pattern": "[A-Z]",
    "stop": ["end"],
    "train": [{"source": "/data/train.jsonl"}],
}
"""A valid value for leaves without a default to take."""

BASE: dict[str, Any] = {
    "model": {"id": "owner/name"},
    "quantization": {"method": "none"},
    "tuning": {"method": "lora"},
    "data": {"train": [{"source": "builtin:icd10cm", "seed": 7}], "validation": {"fraction": 0.1}},
    "output": "runs/test",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A leaf of the schema inside one of the sections that can hold it."""

    path: KeyPath
    block: Block
    entry: Entry

    def __str__(self) -> str:
        return f"{dotted(self.path)}-{self.block.model.__name__}"

    @property
    def key(self) -> str:
        return str(self.path[-1])

    def example(self) -> Any:
        literals = get_args(self.entry.info.annotation)
        if self.entry.required and literals and isinstance(literals[0], str):
            return literals[0]
        if self.block.model is HubSource and self.key == "source":
            return "hub:owner/name"
        if self.block.model is Full and self.key == "targets":
            return "all"
        if self.key in EXAMPLES and not (self.key == "source" and literals):
            return EXAMPLES[self.key]
        return self.entry.default


def _is_leaf(shape: Shape) -> bool:
    if isinstance(shape, Choice):
        return any(_is_leaf(member) for member in shape.members.values())
    if isinstance(shape, Table):
        return isinstance(shape.value, Leaf)
    return isinstance(shape, Leaf) or (isinstance(shape, Items) and isinstance(shape.item, Leaf))


PLACES = [Place(path, block, entry) for path, block, entry in entries(root()) if _is_leaf(entry.shape)]
every_leaf = pytest.mark.parametrize("place", PLACES, ids=str)
quick = settings(max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def test_the_walk_finds_every_section():
    assert len(PLACES) > 150
    assert {place.key for place in PLACES} >= {"new_tokens", "spectrum", "bottleneck", "columns", "trainable_dtype", "rank_pattern"}
    assert {dotted(place.path).split(".")[0] for place in PLACES} == set(root().entries)


# --- building a file around a leaf ---------------------------------------------------------------------------------------------------


def required(block: Block) -> dict[str, Any]:
    """The keys that a section cannot be without."""
    rows = {"data": {"source": "/data/own.jsonl"}} if block.model in (GenerateTask, ChoicesTask) else {}
    return rows | {
        name: Place((name,), block, entry).example() for name, entry in block.entries.items() if entry.required and _is_leaf(entry.shape)
    }


def build(shape: Shape, path: KeyPath, place: Place, content: dict[str, Any]) -> Any:
    """The value of ``shape`` that holds ``content`` in place of the section of ``place``; None where it cannot."""
    if isinstance(shape, Choice):
        return next((built for built in _members(shape, path, place, content)), None)
    if shape is place.block and not path:
        return content
    if isinstance(shape, Items) and path and path[0] == 0:
        inner = build(shape.item, path[1:], place, content)
        return None if inner is None else [inner]
    if isinstance(shape, Table) and path:
        inner = build(shape.value, path[1:], place, content)
        return None if inner is None else {"attention": inner}
    if isinstance(shape, Block) and path and path[0] in shape.entries:
        inner = build(shape.entries[str(path[0])].shape, path[1:], place, content)
        if inner is None:
            return None
        base = {"train": [{"source": "/data/other.jsonl"}]} if path[0] == "validation" else required(shape)
        return {**base, path[0]: inner}
    return None


def _members(choice: Choice, path: KeyPath, place: Place, content: dict[str, Any]) -> Iterator[Any]:
    for tag, member in choice.members.items():
        built = build(member, path, place, content)
        if built is not None:
            yield {choice.key: tag, **built} if choice.key and path else built


def document(place: Place, key: str | None = None, value: Any = None) -> dict[str, Any]:
    """A valid configuration that states the leaf, with ``key`` and ``value`` in its place."""
    value = place.example() if value is None else value
    content = required(place.block)
    content.pop(place.key, None)
    if place.block.model.__name__ == "Group":
        content = {"lr_ratio": 2.0} if place.key == "weight_decay" else {}
    built = build(root(), place.path[:-1], place, {**content, key or place.key: value})
    whole = {**BASE, **built}
    whole["data"].setdefault("train", EXAMPLES["train"])
    if "data" in built and "validation" not in built["data"]:
        whole["data"] = {**built["data"], "validation": {"fraction": 0.1}}
    if whole["data"].get("train") == EXAMPLES["train"] and any(
        item.get("task") == "knowledge" for item in whole.get("evaluation", {}).get("tasks", [])
    ):
        whole["data"] = BASE["data"]
    return _surrounded(whole)


def _surrounded(whole: dict[str, Any]) -> dict[str, Any]:
    """The document with what some methods need beside them."""
    if whole["tuning"].get("init", {}).get("method") == "loftq":
        whole["quantization"] = {"method": "nf4"}
    for task in whole.get("evaluation", {}).get("tasks", []):
        if task.get("pattern"):
            task["metrics"] = ["regex"]
    if whole["model"].get("new_tokens"):
        whole["tuning"] = {"method": "lora", "embeddings": "new-tokens"}
    if whole.get("optimizer", {}).get("galore"):
        whole["optimizer"] |= {"method": "galore"}
        whole["tuning"] = {"method": "full"}
    return whole


def written(place: Place, key: str, value: str) -> tuple[str, int]:
    """The YAML of a configuration with ``key: value`` for the leaf, and the number of that line."""
    lines = yaml.safe_dump(document(place, KEY, VALUE), sort_keys=False, width=1000).splitlines()
    number = next(index for index, line in enumerate(lines) if KEY in line)
    lines[number] = lines[number].replace(KEY, key).replace(VALUE, value)
    return "\n".join(lines) + "\n", number + 1


# --- the properties ------------------------------------------------------------------------------------------------------------------


@st.composite
def misspelt(draw: st.DrawFn, key: str, siblings: frozenset[str]) -> str:
    """``key`` with one character deleted, inserted, replaced, or swapped with the next."""
    position = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from(string.ascii_lowercase + "_"))
    return draw(
        st.sampled_from(
            [
                key[:position] + key[position + 1 :],
                key[:position] + letter + key[position:],
                key[:position] + letter + key[position + 1 :],
                key[:position] + key[position + 1 : position + 2] + key[position] + key[position + 2 :],
                key[:position] + key[position].upper() + key[position + 1 :],
            ]
        ).filter(lambda candidate: candidate and candidate not in siblings)
    )


@every_leaf
@quick
@given(data=st.data())
def test_a7_one_character_wrong_in_a_key_is_refused_at_its_line(place: Place, data: st.DataObject, problems: Any, line_of: Any):
    key = data.draw(misspelt(place.key, frozenset(place.block.entries) | {"extends"}))
    text, line = written(place, key, yaml.safe_dump(place.example(), default_flow_style=True).split("\n")[0])
    found = [problem for problem in problems(text) if problem.where.count(":") >= 2 and line_of(problem) == line]
    assert any(f"`{key}`" in problem.what for problem in found), [str(problem) for problem in problems(text)]
    assert all(problem.fix for problem in found)


WRONG: dict[type, list[str]] = {
    int: ["sixteen", "'16'", "1.5", "[1]", "{a: 1}", "1_000", "12k"],
    float: ["lots", "'0.1'", "[0.1]", "{a: 1}", "0,1", "10%", "true"],
    bool: ["'true'", "1", "0", "[true]", "maybe"],
    str: ["12", "1.5", "true", "[[a]]", "{nobody: 1}"],
}


def kinds(annotation: Any) -> set[type]:
    """The scalar types in an annotation; words of an enumeration are text."""
    if annotation in (int, float, bool, str, type(None)):
        return {annotation}
    if isinstance(annotation, str):
        return {str}
    return set().union(*(kinds(part) for part in get_args(annotation))) if get_args(annotation) else set()


def wrong_values(place: Place) -> list[str]:
    """Values of a wrong type for a leaf, as YAML."""
    allowed = kinds(place.entry.info.annotation)
    values = [value for kind in allowed - {type(None)} for value in WRONG[kind]]
    if bool in allowed:
        values = [value for value in values if value not in ("12", "1.5", "true")] + ["2.5"]
    if int in allowed or float in allowed:  # a union such as "a number or `auto`"
        values = [value for value in values if value not in ("12", "1.5" if float in allowed else "12")]
    if float in allowed:
        values = [value for value in values if value != "1_000"]
    if place.key in ("targets", "chapters", "validation", "train", "new_tokens", *TABLES):
        values = ["12", "true", "[1, 2]", "1.5"]
    if place.key in TABLES:
        values += ["{a: [1]}", "{1: }", "word"]
    return values if type(None) in allowed else [*values, "null", ""]


@every_leaf
@quick
@given(data=st.data())
def test_a7_a_value_of_a_wrong_type_is_refused_at_its_line(place: Place, data: st.DataObject, problems: Any, line_of: Any):
    text, line = written(place, place.key, data.draw(st.sampled_from(wrong_values(place))))
    lines = [line_of(problem) for problem in problems(text) if problem.where.count(":") >= 2]
    assert line in lines, (text, [str(problem) for problem in problems(text)])


def beyond(place: Place) -> st.SearchStrategy[str] | None:
    """Values of the right type that the field's constraints exclude, as YAML; None where every value is allowed."""
    flat = list(_constraints(place.entry.info.annotation)) + list(place.entry.info.metadata)
    allowed = kinds(place.entry.info.annotation)
    low = next((item.ge for item in flat if getattr(item, "ge", None) is not None), None)
    above = next((item.gt for item in flat if getattr(item, "gt", None) is not None), None)
    high = next((value for item in flat for name in ("le", "lt") if (value := getattr(item, name, None)) is not None), None)
    if place.key in TABLES:
        return st.sampled_from(["{question: ''}"] if place.key == "columns" else ["{'layers': 0}", "{'layers': -1}", "{'layers': .nan}"])
    if int in allowed:
        under = st.integers(-(10**6), low - 1) if low is not None else st.nothing()
        return (under | (st.integers(high + 1, high + 10**6) if high is not None else st.nothing())).map(str)
    if float in allowed:
        under = st.floats(-1e6, (low or 0) - 1e-3) if low is not None else st.floats(-1e6, above or 0)
        over = st.floats(high + 1e-3, 1e6) | st.sampled_from([float("inf"), float("nan")]) if high is not None else st.just(float("inf"))
        return (under | over).map(lambda number: {"inf": ".inf", "nan": ".nan"}.get(repr(number), repr(number)))
    enumerated = any(isinstance(word, str) for word in _words(place.entry.info.annotation))
    if str in allowed and (enumerated or place.key == "targets"):
        return st.text(string.ascii_lowercase, min_size=3, max_size=12).map(lambda word: f"x{word}")
    return st.just("''") if allowed <= {str, type(None)} else None


def _words(annotation: Any) -> Iterator[Any]:
    """The words of the enumerations in an annotation."""
    for part in get_args(annotation):
        yield from [part] if get_origin(annotation) is Literal else _words(part)


def _constraints(annotation: Any) -> Iterator[Any]:
    for part in get_args(annotation):
        yield from getattr(part, "metadata", ())
        yield from _constraints(part)


RANGED = [
    place for place in PLACES if beyond(place) is not None and place.key not in ("chapters", "validation") and "source" not in str(place)
]


@pytest.mark.parametrize("place", RANGED, ids=str)
@quick
@given(data=st.data())
def test_a7_a_value_out_of_range_is_refused_at_its_line(place: Place, data: st.DataObject, problems: Any, line_of: Any):
    strategy = beyond(place)
    assert strategy is not None
    text, line = written(place, place.key, data.draw(strategy))
    found = [problem for problem in problems(text) if problem.where.count(":") >= 2 and line_of(problem) == line]
    assert found, (text, [str(problem) for problem in problems(text)])


@every_leaf
def test_a7_the_resolved_configuration_loads_to_the_same_values(place: Place, load: Callable[..., Any]):
    loaded = load(yaml.safe_dump(document(place), sort_keys=False))
    assert load(dump_config(loaded.config)).config == loaded.config
    assert load(show_config(loaded.config, loaded.origins)).config == loaded.config
    name = dotted(place.path).replace("NAME", "attention")
    stated = [origin for path, origin in loaded.origins.items() if path == name or path.startswith(f"{name}.")]
    assert stated
    assert all(origin.kind == "file" for origin in stated)
