"""Nothing is silently ignored: each key that the schema accepts is read by some stage (pitfall A7)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.config.shape import entries, root
from finetune.config.tree import dotted

PACKAGE = Path(__file__).resolve().parents[2] / "finetune"
KEYS = sorted({(block.model.__name__, str(path[-1]), dotted(path)) for path, block, _ in entries(root())})


@pytest.fixture(scope="module")
def stages() -> str:
    """The source of everything that acts on a configuration."""
    files = [path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "config")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize(("section", "key", "path"), KEYS, ids=[f"{path}-{section}" for section, _, path in KEYS])
def test_a7_every_key_is_read_outside_the_config_package(section: str, key: str, path: str, stages: str):
    assert re.search(rf"\.{key}\b", stages), f"no stage reads `{path}` of {section}: wire it, or take it out of the schema"
