"""YAML 1.2 scalars, and the place of every value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config.tree import Document, Place
from finetune.config.yaml12 import compose
from finetune.errors import ConfigError


@pytest.fixture
def read() -> Any:
    def values(text: str) -> Any:
        tree, duplicates = compose(text, Document("test.yaml", tuple(text.split("\n")), "file", Path("/")))
        assert not duplicates
        return tree.plain()

    return values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("2.", 2.0),
        (".5", 0.5),
        ("-0.5", -0.5),
        ("+3", 3),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("off", "off"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("0b101", "0b101"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".", "."),
        ("-", ["-"]),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
    ],
)
def test_a7_scalars_follow_yaml_1_2(text: str, value: Any, read: Any):
    if value == ["-"]:
        assert read("a: [x, -1]")["a"] == ["x", -1]
        return
    found = read(f"a: {text}\n")["a"]
    assert found == value
    assert type(found) is type(value)


def test_keys_are_words_whatever_they_look_like(read: Any):
    assert read("1: a\nno: b\nnull: c\ntrue: d\n") == {"1": "a", "no": "b", "null": "c", "true": "d"}


def test_aliases_repeat_values(read: Any):
    assert read("a: &x {b: [1, 2]}\nc: *x\n") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_a_utf_8_byte_order_mark_is_harmless(minimal: str, load: Any):
    assert load(b"\xef\xbb\xbf" + minimal.encode()).config.model.id == "owner/name"


def test_windows_line_ends_keep_the_line_numbers(minimal: str, problems: Any, line_of: Any):
    (problem,) = problems(minimal.replace("\n", "\r\n") + "seed: -1\r\n")
    assert line_of(problem) == 5
    assert problem.excerpt.startswith("5 | seed: -1\n")


def test_columns_count_characters(minimal: str, problems: Any):
    (problem,) = problems(minimal + 'train: {"epochs": 0}   # größer\n')
    assert problem.where.endswith(":5:19")
    number, caret = problem.excerpt.splitlines()
    assert number[caret.index("^")] == "0"


@pytest.mark.parametrize("column", [1, 60, 100, 300])
def test_the_caret_of_a_long_line_is_visible(column: int):
    line = "".join(chr(ord("a") + index % 26) for index in range(400))
    place = Place(Document("x", (line,), "file", Path("/")), 1, column)
    text, caret = place.excerpt().splitlines()
    assert len(text) <= 76
    assert text[caret.index("^")] == line[column - 1]


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("{a: 1} {b: 2}", "two values on one line", "one key a line"),
        ("{a: 1}\nb: 2", "already are a whole value", "one key a line"),
        ("a: {b: 1} c: 2", "two values on one line", "one key a line"),
        ("a: {b: 1}, c: 2", "two values on one line", "one key a line"),
        ("a: 1 b: 2", "`:` that YAML cannot place", "one key a line"),
        ("a: {b: 1}}", "belongs to nothing", "remove it"),
        ("a: - b", "a list begins in the middle", "line of its own"),
        ("a: *", "YAML reserves", "quotation marks"),
        ("a: |5x\n b", "text follows", "next line"),
        ("%YAML 9\na: 1", "begins with `%`", "remove it"),
        ('a: "\\q"', "that YAML does not know", "single quotation marks"),
        ("... x", "not valid YAML", "one key a line"),
    ],
)
def test_syntax_errors_say_how_to_mend_them(read: Any, text: str, what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(text)
    (problem,) = error.value.problems
    assert what in problem.what
    assert fix in problem.fix
