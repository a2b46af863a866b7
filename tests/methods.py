"""Tuning methods as tests write them, each as small as a tiny model allows."""

from __future__ import annotations

from typing import Any

FIXED: dict[str, dict[str, Any]] = {
    "ia3": {},
    "prompt": {"tokens": 4},
    "prefix": {"tokens": 4},
    "norm": {},
    "bitfit": {},
    "houlsby": {"bottleneck": 8},
    "full": {},
}
"""Those without a low rank."""
