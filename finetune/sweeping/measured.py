"""Whose figures lie in a run's results: `finetune eval` can measure several targets, and keeps them in the first run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.runs import RunDirectory
from finetune.sealed import read_json, sha256_of

_ALONE = "tuned"
"""Column of the one run among the targets."""


def own_columns(run: RunDirectory, found: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of the base of ``run`` and of ``run`` itself in the results ``found``; None where they are not among them, or an older
    file does not tell which is its base."""
    targets: Mapping[str, Mapping[str, Any]] = found.get("record", {}).get("systems", {})
    own = _own(run, targets, found["systems"])
    if own is None:
        return None
    bases: Mapping[str, str] = found.get("bases") or _bases_of_older(targets, found["systems"])
    return (bases[own], own) if own in bases else None


def _own(run: RunDirectory, targets: Mapping[str, Mapping[str, Any]], systems: list[str]) -> str | None:
    """By the run's identity, so that a directory may be moved."""
    if not targets:
        return _ALONE if _ALONE in systems else None
    identity = read_json(run.environment).get("run_id")
    return next((name for name, one in targets.items() if one["kind"] == "run" and one["run_id"] == identity), None)


def _bases_of_older(targets: Mapping[str, Mapping[str, Any]], systems: list[str]) -> dict[str, str]:
    """Files of older versions have all changes against the first system: of one base that all share, or of the first target's."""
    first = systems[0]
    bases = {name: one for name, one in targets.items() if one["kind"] == "base"}
    if len(bases) > 1:
        return {bases[first]["of"]: first} if first in bases else {}
    return dict.fromkeys(systems[1:], first)


def is_measured_alone(run: RunDirectory) -> bool:
    """Whether the run's last results are of this run and its base, of nothing else, and lie beside what they were summed from.

    Results with further targets may have been measured with their tasks, and hold figures of what all of them have alone.
    """
    if not run.results.is_file():
        return False
    found = read_json(run.results)
    columns = own_columns(run, found)
    if columns is None or set(found["systems"]) != set(columns):
        return False
    items = found.get("record", {}).get("items")
    return items is None or (run.items.is_file() and sha256_of(run.items) == items)  # older files do not speak of them
