"""Where a merge or an export may be written: into a directory that is new, empty, or an earlier merge that --force replaces."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from finetune.errors import ConfigError
from finetune.runs import COMBINED

REPORT = "merge.json"
"""The record in every directory that a merge or an export wrote."""


def require_destination(destination: Path, read: Iterable[Path], *, force: bool) -> None:
    """ConfigError where ``destination`` is a link, is taken, or overlaps with one of the directories that are ``read``."""
    where = str(destination)
    if destination.is_symlink():
        raise ConfigError("the destination is a symbolic link", where=where, fix="name a directory")
    inside = [
        path
        for path in read
        if destination.resolve().is_relative_to(path.resolve()) or path.resolve().is_relative_to(destination.resolve())
    ]
    if inside:
        raise ConfigError(f"the destination overlaps with {inside[0]}, which is read", where=where, fix="name a directory elsewhere")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not force:
        raise ConfigError("the destination is not empty", where=where, fix="name a new directory, or replace an earlier merge with --force")
    if not any((destination / record).is_file() for record in (REPORT, COMBINED)):
        # --force replaces the whole directory: never one that something else wrote
        raise ConfigError("the destination holds something other than a merged model", where=where, fix="name a new directory")


def clear_leftovers(destination: Path) -> None:
    """Remove what killed processes left half-written beside ``destination``, and give its name back where one had taken it away."""
    for path in destination.parent.glob(f".{destination.name}.*"):
        found = re.fullmatch(rf"\.{re.escape(destination.name)}\.(\d+)\.(tmp|old)", path.name)
        if found is None or _is_running(int(found[1])):
            continue
        if found[2] == "old" and not destination.exists():
            path.rename(destination)
        else:
            shutil.rmtree(path)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
