"""The configurations and recipes that ship with the package, found in a wheel and in a source checkout alike."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finetune.config.hints import nearest
from finetune.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A preset: which knobs for which goal."""

    name: str
    summary: str
    path: Path


def shipped_directory(kind: str) -> Path:
    """Where `configs` or `recipes` are: inside an installed package, or at the root of a checkout."""
    installed = _PACKAGE / "shipped" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def recipes() -> tuple[Recipe, ...]:
    """Every shipped recipe, by name."""
    return tuple(Recipe(path.stem, _summary(path), path) for path in sorted(shipped_directory("recipes").glob("*.yaml")))


def recipe_names() -> tuple[str, ...]:
    """The names of the shipped recipes."""
    return tuple(path.stem for path in sorted(shipped_directory("recipes").glob("*.yaml")))


def find_recipe(name: str) -> Path | None:
    """The file of a shipped recipe."""
    return shipped_directory("recipes") / f"{name}.yaml" if name in recipe_names() else None


def config_names() -> tuple[str, ...]:
    """The shipped configurations as a user names them, such as ``configs/medical-8b.yaml``."""
    return tuple(f"configs/{path.name}" for path in sorted(shipped_directory("configs").glob("*.yaml")))


def find_config(path: Path) -> Path:
    """An existing file as it is; else the shipped one of that name; else an error that lists what there is."""
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError("this is a directory, not a YAML file", where=str(path), fix=_suggestion(path, path))
    if path.parts[:-1] == ("configs",) and path.as_posix() in config_names():
        return shipped_directory("configs") / path.name
    directory = path.parent if path.parent.is_dir() else Path()
    raise ConfigError("there is no such file", where=str(path), fix=_suggestion(path, directory))


def _suggestion(path: Path, directory: Path) -> str:
    here = {str(found): found.stem for found in sorted(directory.glob("*.y*ml"))}
    names = {**here, **{name: Path(name).stem for name in config_names()}}
    close = nearest(path.stem, tuple(names.values()))
    meant = next((name for name, stem in names.items() if stem == close), None)
    if meant:
        return f"did you mean {meant}?"
    return f"shipped configurations: {', '.join(config_names())}"


def _summary(path: Path) -> str:
    """The first sentence of a recipe's leading comment."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if line.startswith("#") and text and not text.startswith("yaml-language-server"):
            return re.split(r"(?<=[.])\s", text, maxsplit=1)[0]
    return ""
