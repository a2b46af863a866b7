"""What is known of data without preparing it: an earlier preparation's figures as long as nothing changed, else lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import api
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.data.counted import count, counts_of, note_of, remember
from finetune.data.report import DataReport, SideReport

PAST = 1_700_000_000
REPORT = DataReport(train=SideReport(examples=19, tokens=500, supervised=120, longest=44), validation=SideReport(examples=5))


def aged(path: Path) -> Path:
    """``path`` with a time of change that lies long ago: a file written a moment ago is not told by its time."""
    os.utime(path, (PAST, PAST))
    return path


def rows_file(path: Path, number: int, row: dict[str, Any] | None = None) -> Path:
    line = json.dumps(row or {"question": "What?", "answer": "That."})
    path.write_text("\n".join([line] * number))  # the last line is unfinished, and is a row
    return aged(path)


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Config]:
    """(*overrides, **data) -> a configuration whose data section is ``data``."""

    def load(*overrides: str, **data: Any) -> Config:
        path = tmp_path / "run.yaml"
        tuning = {"method": "lora"}
        path.write_text(json.dumps({"model": {"id": "a/b"}, "tuning": tuning, "data": data, "output": "out"}))
        return load_config(path, overrides).config

    return load


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_figures_of_a_preparation_are_found_again_until_something_changes(tmp_path: Path, configured: Callable[..., Config]) -> None:
    source = rows_file(tmp_path / "a.jsonl", 24)
    data = {"train": [{"source": str(source)}], "validation": {"fraction": 0.2}}
    remember(note_of(configured(**data)), REPORT)
    found = count(configured(**data))
    assert found == counts_of(REPORT)
    assert found.exact
    assert (found.rows, found.validation_rows, found.tokens, found.supervised, found.longest) == (19, 5, 500, 120, 44)
    assert count(configured("train.epochs=3", **data)) == found  # what preparation does not see
    for changed in ("data.max_tokens=64", "seed=1", "model.id=a/c", "data.supervise=all"):
        other = count(configured(changed, **data))
        assert other is not None
        assert not other.exact, changed
    rows_file(source, 25)
    assert count(configured(**data)) != found


def test_a_file_that_was_written_a_moment_ago_is_not_noted(tmp_path: Path, configured: Callable[..., Config], cache: Path) -> None:
    source = rows_file(tmp_path / "a.jsonl", 3)
    os.utime(source)
    assert note_of(configured(train=[{"source": str(source)}])) is None
    remember(None, REPORT)
    assert not cache.exists()


def test_a_damaged_note_is_no_note(tmp_path: Path, configured: Callable[..., Config]) -> None:
    config = configured(train=[{"source": str(rows_file(tmp_path / "a.jsonl", 3))}])
    note = note_of(config)
    assert note is not None
    remember(note, REPORT)
    for text in ("{", "[]", '{"rows": 3}', '{"rows": 1, "nonsense": 2}'):
        note.write_text(text)
        found = count(config)
        assert found is not None
        assert (found.rows, found.exact) == (3, False)


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, configured: Callable[..., Config], cache: Path) -> None:
    config = configured(train=[{"source": str(rows_file(tmp_path / "a.jsonl", 3))}])
    cache.write_text("a file, where a directory should be")
    remember(note_of(config), REPORT)
    assert count(config) is not None


def test_lines_are_counted_by_weight_and_side(tmp_path: Path, configured: Callable[..., Config]) -> None:
    first, second = rows_file(tmp_path / "a.jsonl", 10), rows_file(tmp_path / "b.jsonl", 20)
    train = [{"source": str(first), "weight": 2.0}, {"source": str(second), "weight": 0.5}]
    found = count(configured(train=train))
    assert found is not None
    assert (found.rows, found.validation_rows, found.tokens, found.exact) == (30, 0, None, False)
    split = count(configured(train=train, validation={"fraction": 0.1}))
    assert split is not None
    assert (split.rows, split.validation_rows) == (27, 3)
    apart = count(configured(train=train, validation=[{"source": str(rows_file(tmp_path / "c.jsonl", 7))}]))
    assert apart is not None
    assert (apart.rows, apart.validation_rows) == (30, 7)


def test_what_is_no_row_a_line_is_unknown(tmp_path: Path, configured: Callable[..., Config]) -> None:
    texts = rows_file(tmp_path / "texts.jsonl", 3, {"text": "A document, which is cut into blocks."})
    table = tmp_path / "a.csv"
    table.write_text("question,answer\nWhat?,That.\n")
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    for source in (str(texts), str(table), str(broken), str(tmp_path / "missing.jsonl"), "builtin:icd10cm"):
        assert count(configured(train=[{"source": source}])) is None, source
    assert count(configured(train=[{"source": "hub:a/b", "revision": "0" * 40}])) is None


def test_preparing_notes_what_it_counted(write_config: Callable[..., Path], chat_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "rows.jsonl"
    copy.write_text(chat_file.read_text())
    config = api.load_config(write_config(data={"train": [{"source": str(aged(copy))}], "validation": {"fraction": 0.2}})).config
    inputs = api.prepare_data(config)
    assert count(config) == counts_of(inputs.data.report)
