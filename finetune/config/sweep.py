"""The file of `finetune sweep`: one configuration, and what is varied over it."""

from __future__ import annotations

import itertools
import json
import os.path
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from finetune.config import shape
from finetune.config.allowed import allowed
from finetune.config.figure_names import VALIDATION_LOSS, figure_names, general_name, trained_names
from finetune.config.hints import nearest
from finetune.config.layers import shown
from finetune.config.load import Loaded, load_config
from finetune.config.section import Section
from finetune.config.translate import in_a_sentence
from finetune.config.tree import Document, KeyPath, Node, dotted
from finetune.config.yaml12 import compose, read_text
from finetune.errors import ConfigError, Problem

_LINE_ENDS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_NOT_IN_A_NAME = re.compile(r"[^\w.+-]+")
_NAME = re.compile(r"[\w][\w.+-]*")
_EXAMPLES = {
    "config": "config: medical.yaml",
    "output": "output: runs/rates",
    "arms": "arms: {attention: {tuning.targets: attention}, all: {tuning.targets: all-linear}}",
    "grid": "grid: {optimizer.learning_rate: [1.0e-4, 3.0e-4]}",
    "evaluate": "evaluate: true",
    "select": f"select: {VALIDATION_LOSS}",
    "columns": 'columns: ["general text: loss"]',
}

Values = Annotated[tuple[Any, ...], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class Sweep(Section):
    """Runs of one configuration: every arm with every combination of the grid."""

    config: Text
    """The configuration that all share: a path, relative to this file, or the name of one that ships with the package."""
    output: Text
    """Directory of the runs, one below it each. Relative paths start at the working directory."""
    arms: dict[str, dict[str, Any]] = {}
    """Name -> keys and values, as `-o` takes them. A key of the grid takes a list: this arm's own values. Without arms there is one, which
    changes nothing."""
    grid: dict[str, Values] = {}
    """Key -> values to try, for every arm."""
    evaluate: bool = True
    """Measure each run as the `evaluation` section of its configuration says."""
    select: Text = VALIDATION_LOSS
    """The figure by which the best run of an arm is chosen: `validation loss`, or the name of one that `finetune eval` shows."""
    columns: tuple[str, ...] = ()
    """Further figures that the table shows."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a sweep."""

    arm: str
    settings: Mapping[str, Any]
    """What it changes, by dotted key."""
    run: Path
    """Its directory."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """As `-o` takes them, the output included."""
        changed = {**self.settings, "output": str(self.run)}
        return tuple(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changed.items())


@dataclass(frozen=True, slots=True)
class Planned:
    """A sweep whose every configuration was read."""

    sweep: Sweep
    path: Path
    """Of the configuration that all share."""
    directory: Path
    cases: tuple[tuple[Case, Loaded], ...]


def load_sweep(path: Path) -> Planned:
    """The sweep in a YAML file with the configuration of each of its runs; ConfigError with every problem of all of them."""
    text = read_text(path)
    document = Document(shown(path), tuple(_LINE_ENDS.split(text)), "file", path.parent.absolute())
    tree, duplicates = compose(text, document)
    if not isinstance(tree.content, dict):
        raise ConfigError("a sweep is a mapping, and this is not", where=str(tree.at), fix="write `config:`, `output:` and `grid:`")
    if {"model", "tuning", "extends"} & tree.content.keys():
        fix = f"write another file with `config: {path.name}`, `output:` and `grid:`, and name that one"
        raise ConfigError("this is the configuration of one run, not a sweep", where=document.name, fix=fix)
    try:
        sweep = Sweep.model_validate_json(json.dumps(tree.plain()), strict=True)
    except ValidationError as error:
        raise ConfigError.from_problems([*_refused(error.errors(), tree), *duplicates]) from error
    problems = [*_contradictions(sweep, tree), *duplicates]
    if problems:
        raise ConfigError.from_problems(problems)
    base = _base(sweep, document.directory)
    found = _loaded(base, list(cases(sweep)))
    if problems := list(_unknown_figures(sweep, found, tree)):
        raise ConfigError.from_problems(problems)
    return Planned(sweep, base, Path(sweep.output), found)


def sweep_schema() -> dict[str, Any]:
    """The file as JSON Schema."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Sweep.model_json_schema(), "title": "A file of finetune sweep"}


def cases(sweep: Sweep) -> Iterator[Case]:
    """Every run, arm by arm, the last key of the grid changing first."""
    for arm, own in (sweep.arms or {"": {}}).items():
        grid = {key: own[key] if _is_own_grid(own.get(key)) else values for key, values in sweep.grid.items()}
        for values in itertools.product(*grid.values()):
            varied = dict(zip(grid, values, strict=True))
            yield Case(arm, own | varied, Path(sweep.output) / _name(arm, varied))


def _is_own_grid(value: Any) -> bool:
    """Whether an arm that says this of a key of the grid gives its own values."""
    return isinstance(value, list) and bool(value)


def _name(arm: str, varied: Mapping[str, Any]) -> str:
    """Such as ``attention_learning_rate-0.0001``."""
    parts = [f"{key.rpartition('.')[2]}-{_short(value)}" for key, value in varied.items()]
    return "_".join([arm, *parts] if arm else parts) or "run"


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return _NOT_IN_A_NAME.sub("-", text).strip("-") or "empty"


def _base(sweep: Sweep, directory: Path) -> Path:
    """The shared configuration: beside the sweep's file where it is there, else as every command looks for it."""
    beside = Path(os.path.normpath(directory / os.path.expanduser(sweep.config)))  # noqa: PTH111 - only ~
    return beside if beside.is_file() else Path(sweep.config)


def _loaded(base: Path, found: Sequence[Case]) -> tuple[tuple[Case, Loaded], ...]:
    load_config(base, [f"output={json.dumps(str(found[0].run))}"])  # what is wrong with the shared file is said once
    loaded: list[tuple[Case, Loaded]] = []
    problems: dict[Problem, str] = {}
    for case in found:
        try:
            loaded.append((case, load_config(base, case.overrides)))
        except ConfigError as error:
            problems |= {problem: case.run.name for problem in error.problems if problem not in problems}
    if problems:
        raise ConfigError.from_problems(
            Problem(f"{name}: {problem.what}", problem.where, problem.fix, problem.excerpt) for problem, name in problems.items()
        )
    return tuple(loaded)


# --- messages ------------------------------------------------------------------------------------------------------------------------


def _refused(errors: Sequence[Any], tree: Node) -> Iterator[Problem]:
    strangers = [str(error["loc"][0]) for error in errors if error["type"] == "extra_forbidden"]
    seen = set()
    for error in sorted(errors, key=lambda one: _line(tree, one["loc"])):
        path: KeyPath = tuple(error["loc"])
        kind, name, node = error["type"], str(path[0]), tree.nearest(path)
        if kind == "missing" and not nearest(name, strangers):
            yield Problem(f"`{dotted(path)}` is missing", tree.at.document.name, f"add `{_EXAMPLES[name]}`")
        elif kind == "extra_forbidden":
            meant = nearest(name, Sweep.model_fields)
            fix = f"did you mean `{meant}`?" if meant else f"known here: {', '.join(Sweep.model_fields)}"
            yield Problem(f"unknown key `{name}`", str(node.heading), fix, node.heading.excerpt())
        elif kind != "missing" and path not in seen:
            wanted = "a list with at least one entry" if kind == "too_short" else allowed(shape.at(path, tree.plain(), shape.of(Sweep)))
            what = f"`{dotted(path)}` is {in_a_sentence(node)}; allowed: {wanted}"
            yield Problem(what, str(node.at), f"such as `{_EXAMPLES[name]}`", node.at.excerpt())
        seen.add(path)


def _line(tree: Node, path: KeyPath) -> tuple[int, int]:
    place = tree.nearest(path).heading
    return place.line, place.column


def _contradictions(sweep: Sweep, tree: Node) -> Iterator[Problem]:
    for path, what, fix in itertools.chain(_outputs(sweep), _arms(sweep), _names(sweep)):
        place = tree.nearest(path).heading
        yield Problem(what, str(place), fix, place.excerpt())
    if sweep.select != VALIDATION_LOSS and not sweep.evaluate:
        place = tree.nearest(("select",)).heading
        what = f"{sweep.select!r} is measured by `finetune eval`, and `evaluate` is false"
        yield Problem(what, str(place), "remove one of the two", place.excerpt())


def _unknown_figures(sweep: Sweep, found: Sequence[tuple[Case, Loaded]], tree: Node) -> Iterator[Problem]:
    """Names of figures that a run of the sweep cannot have, as far as its configuration tells which it has."""
    columns: dict[KeyPath, str] = {("columns", place): name for place, name in enumerate(sweep.columns)}
    for path, name in {("select",): sweep.select, **columns}.items():
        for case, loaded in found:
            known = figure_names(loaded.config) if sweep.evaluate else trained_names(loaded.config)
            if known is not None and general_name(name) not in known:
                place, meant = tree.nearest(path).at, nearest(name, known)
                there = f"there are: {', '.join(sorted(known))}" if known else "give it data.validation, or let it be evaluated"
                fix = f"did you mean {meant!r}?" if meant else there
                what = f"run {case.run.name} will have no figure called {name!r}, which `{path[0]}` names"
                yield Problem(what, str(place), fix, place.excerpt())
                break


_Contradiction = tuple[KeyPath, str, str]
"""Where, what and how to mend it."""


def _outputs(sweep: Sweep) -> Iterator[_Contradiction]:
    places: list[KeyPath] = [("arms", arm, "output") for arm, own in sweep.arms.items() if "output" in own]
    for place in [*places, *([("grid", "output")] if "output" in sweep.grid else [])]:
        yield place, "each run has its own output below the sweep's", "leave it out"


def _arms(sweep: Sweep) -> Iterator[_Contradiction]:
    for arm, own in sweep.arms.items():
        if not _NAME.fullmatch(arm):
            yield ("arms", arm), f"{arm!r} cannot be part of a directory's name", "use letters, digits, dots and dashes"
        for key in own.keys() & sweep.grid.keys():
            if not _is_own_grid(own[key]):
                what = f"`{key}` is varied by the grid, and the arm {arm} sets it"
                yield ("arms", arm, key), what, "give the arm a list of its own values, or leave the key out of one of the two"


def _names(sweep: Sweep) -> Iterator[_Contradiction]:
    seen: set[Path] = set()
    for case in cases(sweep):
        if case.run in seen:
            yield ("grid",), f"two runs would be called {case.run.name}", "values must differ by more than punctuation"
            return
        seen.add(case.run)
