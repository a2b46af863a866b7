"""Configurations as text, and what is said about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.load import Loaded, load_config
from finetune.errors import ConfigError, Problem

MINIMAL = """\
model: {id: owner/name}
tuning: {method: lora}
data: {train: [{source: /data/train.jsonl}], validation: {fraction: 0.1}}
output: runs/test
"""


@pytest.fixture(scope="session")
def minimal() -> str:
    """The least that is a configuration."""
    return MINIMAL


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all files of the session: property tests write thousands."""
    return tmp_path_factory.mktemp("configs")


@pytest.fixture(scope="session")
def load(folder: Path) -> Callable[..., Loaded]:
    """Load a configuration from its text."""

    def load_text(text: str | bytes, *overrides: str) -> Loaded:
        path = folder / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path, overrides)

    return load_text


@pytest.fixture(scope="session")
def problems(load: Callable[..., Loaded]) -> Callable[..., tuple[Problem, ...]]:
    """What is wrong with a configuration: every problem of its one ConfigError."""

    def problems_of(text: str | bytes, *overrides: str) -> tuple[Problem, ...]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        return caught.value.problems

    return problems_of


@pytest.fixture(scope="session")
def line_of() -> Callable[[Problem], int]:
    """The line that a problem points to."""

    def line(problem: Problem) -> int:
        parts = problem.where.rsplit(":", 2)
        assert len(parts) == 3, problem.where
        return int(parts[1])

    return line
