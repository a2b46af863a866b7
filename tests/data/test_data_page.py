"""docs/data.md: every example row is what its heading says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.data.formats import Conversation, Text, parse
from finetune.data.sources import Row

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
EXAMPLES = [
    (name, block)
    for name, section in re.findall(r"^## `(\S+)`\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    for block in re.findall(r"^```json\n(.*?)\n```$", section, re.M | re.S)
]


def test_every_format_has_an_example() -> None:
    assert {name for name, _ in EXAMPLES} == {"chat", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text"}


@pytest.mark.parametrize(("name", "block"), EXAMPLES)
def test_an_example_row_is_one_line_and_is_recognized(name: str, block: str) -> None:
    assert "\n" not in block
    row = Row(json.loads(block), "data.md:1")
    record = parse(row)
    assert record == parse(row, name)
    assert isinstance(record, Text if name == "text" else Conversation)
    if "tool_calls" in block:
        assert isinstance(record, Conversation)
        assert record.tools
        assert any(message.tool_calls for message in record.messages)
