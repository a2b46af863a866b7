"""What a run came to, as tests compare it with another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.sealed import read_json, verify

MEASURED = {"seconds", "input_seconds", "memory_bytes"}
"""Of a row: differs from run to run."""


def result(run: Path) -> str:
    """SHA-256 of its adapter's weights, in a directory that is whole."""
    verify(run / "adapter")
    return str(read_json(run / "adapter" / "MANIFEST.json")["sha256"]["adapter_model.safetensors"])


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, without what differs from run to run."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]
