"""What is measured: words of the command line as runs, adapters and models, told apart by their files before anything is loaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.errors import ConfigError
from finetune.runs import RunDirectory

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[0-9a-f]{40})?")
_ADAPTER = "adapter_config.json"
EXPECTED = "name a run, an adapter or model directory, a hub id (owner/name, or owner/name@COMMIT) or builtin:smollm2-135m"
"""What a target can be, as a fix."""


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to measure."""

    word: str
    """As the user wrote it; for a run the path of its directory."""
    kind: Literal["run", "adapter", "model"]
    name: str
    """Short, for the head of a column."""

    @property
    def path(self) -> Path:
        """Directory of a run or an adapter."""
        return Path(self.word).expanduser()

    @property
    def model_id(self) -> str:
        """Of a model: the hub id, directory or builtin."""
        return self.word if self.path.is_dir() else self.word.partition("@")[0]

    @property
    def revision(self) -> str | None:
        """Of a hub id: the commit that it names."""
        return None if self.path.is_dir() else self.word.partition("@")[2] or None


def find_targets(words: Sequence[Path | str]) -> tuple[Target, ...]:
    """Each of ``words`` (at least one) as a target; ConfigError where one is none, or two are the same."""
    found = tuple(_target(str(word)) for word in words)
    for place, target in enumerate(found):
        if any(target.word == other.word for other in found[:place]):
            raise ConfigError(f"{target.word} is named twice", where="TARGET", fix="name it once")
    return found


def column_names(targets: Sequence[Target]) -> dict[str, str]:
    """Word of each target -> the name of its column. The one run or adapter among models is ``tuned``.

    Those that would share a name say more of where they are, such as ``merged/a`` beside the run ``a``.
    """
    trained = [target for target in targets if target.kind != "model"]
    places = [_place(target) for target in targets]
    names = [_shortest(place, places[:number] + places[number + 1 :]) for number, place in enumerate(places)]
    return {target.word: "tuned" if trained == [target] else name for target, name in zip(targets, names, strict=True)}


def _place(target: Target) -> str:
    """Where it is, ending in its name."""
    if target.path.is_dir():
        return target.path.resolve().as_posix()
    return target.word.partition("@")[0].removeprefix("builtin:")


def _shortest(place: str, others: Sequence[str]) -> str:
    """The last part of ``place`` with as many of those before it as tell it from ``others``; all of them where none do."""
    parts = place.split("/")
    for count in range(1, len(parts)):
        short = "/".join(parts[-count:])
        if not any(f"/{other}".endswith(f"/{short}") for other in others):
            return short
    return place


def require_apart(names: Sequence[str]) -> None:
    """ConfigError where two models would share a column."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two models are called {name!r}", where="TARGET", fix="rename a directory, or evaluate them one after the other"
            )


def _target(word: str) -> Target:
    path = Path(word).expanduser()
    if path.is_dir():
        return _directory(word, path)
    if path.exists():
        raise ConfigError("this is a file, and cannot be measured", where=word, fix=EXPECTED)
    if word.startswith("builtin:"):
        return Target(word, "model", word.removeprefix("builtin:"))
    parent = path.parent
    is_path = word.startswith((".", "/", "~")) or (parent != Path() and parent.is_dir())
    if is_path or not _HUB_ID.fullmatch(word):
        raise ConfigError("there is no such directory", where=word, fix=nearest(path) or EXPECTED)
    return Target(word, "model", word.partition("@")[0].rpartition("/")[2])


def nearest(path: Path) -> str:
    """A question after the directory beside ``path`` whose name is nearest to its own; empty where none is near."""
    parent = path.parent
    directories = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, directories, n=1)
    return f"did you mean {parent / near[0]}?" if near else ""


def _directory(word: str, path: Path) -> Target:
    name = path.resolve().name
    if _is_run(path):
        return Target(str(path), "run", name)
    if (path / _ADAPTER).is_file():
        if name == "adapter" and _is_run(path.resolve().parent):
            return _directory(str(path.parent), path.parent)
        return Target(word, "adapter", name)
    if (path / "config.json").is_file():
        return Target(word, "model", name)
    raise ConfigError(
        "not a run (config.yaml and environment.json), an adapter (adapter_config.json) or a model (config.json)", where=word, fix=EXPECTED
    )


def _is_run(path: Path) -> bool:
    run = RunDirectory(path)
    return run.config.is_file() and run.environment.is_file()
