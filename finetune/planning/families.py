"""The models whose shapes ship with the package, so that a plan needs neither the hub nor a copy: `families.json` beside this file.

Each entry holds the hub ids that share the shapes, the sizes under the names of config.json, the number of parameters that the hub states
for the model, a tied head counted once, and the length of its tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

SMOLLM2_135M = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One entry of the table."""

    ids: tuple[str, ...]
    parameters: int
    """As published: the tests hold the shapes to it."""
    tokens: int
    """Tokens of its tokenizer, added ones included; the embedding may have more rows."""
    config: dict[str, Any]
    """As config.json has it."""


@lru_cache(maxsize=1)
def known_models() -> tuple[KnownModel, ...]:
    """The whole table."""
    entries = json.loads(Path(__file__).with_name("families.json").read_text(encoding="utf-8"))
    return tuple(KnownModel(tuple(entry.pop("ids")), **entry) for entry in entries)


def find(model_id: str) -> KnownModel | None:
    """The entry of a hub id; upper and lower case are not told apart."""
    return next((known for known in known_models() if model_id.lower() in (one.lower() for one in known.ids)), None)
