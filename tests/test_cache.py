"""What is kept between runs: made once, and then only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import cache
from finetune.cache import cached


def test_a_hit_locks_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a cache on a read-only disk serves what is in it."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    made: list[Path] = []

    def make(directory: Path) -> None:
        made.append(directory)
        (directory / "file").write_text("content")

    first = cached("things", "key", make)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a lock or directory was asked for")

    monkeypatch.setattr(cache, "FileLock", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert cached("things", "key", make) == first
    assert len(made) == 1
    (first / "file").write_text("damaged")
    with pytest.raises(AssertionError, match="was asked for"):
        cached("things", "key", make)
