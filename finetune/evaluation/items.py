"""What every figure was summed from, kept beside the figures: models that were measured apart can then be compared on the same items.

`eval/NAME.json` has `eval/items/NAME.json` beside it. Of each figure and system it holds two sums for each cluster (what bootstrap draws:
a fact, a row, a piece of text), from which every value, interval and difference can be computed again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import VerificationError
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.statistics import Quantity, cluster_sums
from finetune.runs import items_path
from finetune.sealed import read_json, sha256_of, write_text

Measured = Mapping[str, Mapping[str, Measurement]]
"""Task -> system -> measurement."""

DIGITS = 9
"""Significant digits that are kept: sums in fp32 have seven."""


def write_items(results: Path, measured: Measured) -> str:
    """Keep the items of ``measured`` beside the file ``results``, replaced in one step; returns their sha256."""
    path = items_path(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(as_items(measured), separators=(",", ":"), allow_nan=False) + "\n")
    return sha256_of(path)


def read_items(results: Path) -> dict[str, dict[str, Measurement]]:
    """What `write_items` kept. VerificationError where there is nothing, nothing that can be read, or what belongs to other results."""
    path = items_path(results)
    if path.is_file() and sha256_of(path) != read_json(results)["record"].get("items"):
        raise VerificationError("the stored items are not those of the results", where=str(path), fix="run `finetune eval` again")
    try:
        return from_items(read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError(f"the stored items are damaged: {error}", where=str(path), fix="run `finetune eval` again") from error


def as_items(measured: Measured) -> dict[str, Any]:
    """``measured`` for JSON: by task and figure, the clusters in sorted order and each system's numerators and denominators."""
    return {task: _figures(systems) for task, systems in measured.items() if systems}


def _figures(systems: Mapping[str, Measurement]) -> dict[str, Any]:
    first = next(iter(systems.values()))
    return {
        one.name: {
            "unit": one.unit,
            "better": one.better,
            "transform": one.transform,
            "clusters": np.unique(one.clusters).tolist(),
            "systems": {name: _sums(found.quantities[place]) for name, found in systems.items()},
        }
        for place, one in enumerate(first.quantities)
    }


def _sums(quantity: Quantity) -> list[list[float]]:
    """[numerators, denominators] by cluster."""
    return [[float(f"{number:.{DIGITS}g}") for number in part] for part in cluster_sums(quantity).T.tolist()]


def from_items(found: Mapping[str, Any]) -> dict[str, dict[str, Measurement]]:
    """Task -> system -> measurement, one item a cluster. KeyError, TypeError or ValueError where ``found`` is no such thing."""
    return {task: _measurements(figures) for task, figures in found.items()}


def _measurements(figures: Mapping[str, Any]) -> dict[str, Measurement]:
    systems = next(iter(figures.values()))["systems"] if figures else {}
    if any(kept["systems"].keys() != systems.keys() for kept in figures.values()):
        raise ValueError("the figures are not of the same systems")
    return {name: Measurement(tuple(_quantity(figure, kept, name) for figure, kept in figures.items())) for name in systems}


def _quantity(name: str, kept: Mapping[str, Any], system: str) -> Quantity:
    numerators, denominators = (np.asarray(part, dtype=np.float64) for part in kept["systems"][system])
    clusters = np.asarray(kept["clusters"])
    return Quantity(name, kept["unit"], kept["better"], numerators, denominators, clusters, kept["transform"])
