"""What is said of a configuration that is valid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.config.load import load_config
from finetune.config.notes import unusual_rates


@pytest.mark.parametrize(
    ("tuning", "rate", "said"),
    [
        ({"method": "full"}, None, "high for `tuning.method: full`"),
        ({"method": "full"}, 5e-5, ""),
        ({"method": "prompt"}, None, "low for `tuning.method: prompt`"),
        ({"method": "prefix"}, 5e-4, "low for `tuning.method: prefix`"),
        ({"method": "prompt"}, 1e-3, ""),
        ({"method": "lora"}, None, ""),
    ],
)
def test_rates_that_rarely_work_are_noted(write_config: Callable[..., Path], tuning: dict[str, Any], rate: float | None, said: str) -> None:
    path = write_config(tuning=tuning, optimizer={} if rate is None else {"learning_rate": rate})
    notes = unusual_rates(load_config(path).config)
    assert len(notes) == bool(said)
    assert said in "".join(notes)
