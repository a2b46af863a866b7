"""Broken data files: each names its file and line, the reason and the fix."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from finetune.data.formats import Conversation, Text, parse
from finetune.data.sources import Row, read_rows
from finetune.errors import DataError

DEEP = "[" * 100_000 + "]" * 100_000
BAD = {
    "truncated.jsonl": ('{"text": "ok"}\n{"text": "cut', ":2", "not valid JSON"),
    "list-row.jsonl": ("[1, 2]\n", ":1", "must be an object"),
    "object.json": ('{"text": "a"}', "object.json", "one list of objects"),
    "broken.json": ('[{"text": "a"},\n{"text" "b"}]', ":2", "not valid JSON"),
    "ragged.csv": ("question,answer\na,b\nc\n", ":3", "as many columns"),
    "open.csv": ('question,answer\na,"b\n\nc,d\n', ":2", "not valid CSV"),
    "blank-ragged.csv": ("question,answer\na,b\n\nc\n", ":4", "as many columns"),
    "deep.jsonl": (f'{{"text": "ok"}}\n{{"text": {DEEP}}}\n', ":2", "nested too deeply"),
    "deep.json": (f'[{{"text": "ok"}},\n{{"text": {DEEP}}}]', ":2", "nested too deeply"),
    "only-deep.json": (DEEP, ":1", "nested too deeply"),
    "twice.jsonl": ('{"text": "ok"}\n{"text": "a", "text": "b"}\n', ":2", "the key 'text' stands more than once"),
    "twice.json": ('[\n{"text": "ok"},\n\n{"text": "a", "text": "b"}]', ":4", "the key 'text' stands more than once"),
    "twice-object.json": ('\n{"text": "a", "text": "b"}', ":2", "the key 'text' stands more than once"),
    "twice-inside.jsonl": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "a", "content": "b"}]}',
        ":1",
        "the key 'content' stands more than once",
    ),
    "digits.json": ('[{"text": "ok"},\n{"text": ' + "1" * 5000 + "}]", ":2", "not readable JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_broken_files_name_their_line(tmp_path: Path, name: str) -> None:
    text, place, what = BAD[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_rows(str(path)))
    problem = caught.value.problems[0]
    assert what in problem.what
    assert problem.where.endswith(place)
    assert str(path) in problem.where
    assert problem.fix


def test_wrong_encoding_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="UTF-8") as caught:
        list(read_rows(str(path)))
    assert caught.value.problems[0].where.endswith(":2")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "nothing to learn"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "is empty"),
        ({"messages": [{"role": "assistant", "content": None}]}, "must be text"),
        ({"messages": [{"role": "assistant", "content": "x", "wieght": 0}]}, "exactly 'role' and 'content'"),
        ({"question": "x", "answer": ""}, "'answer' is empty"),
        ({"question": "x", "reply": "y"}, "no known format"),
        ({"text": 3}, "must be text"),
        ({}, "no known format"),
    ],
)
def test_rows_that_fit_no_format(row: dict[str, object], what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        parse(Row(row, "chat.jsonl:7"))
    assert caught.value.problems[0].where.startswith("chat.jsonl:7")
    assert caught.value.problems[0].fix


def test_half_a_surrogate_pair_in_an_unknown_row_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text(r'{"body": "a \ud800"}')
    with pytest.raises(DataError, match="no known format") as caught:
        [parse(row) for row in read_rows(str(path))]
    assert r"a \ud800" in str(caught.value).encode().decode()


def test_csv_fields_are_as_long_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("question,answer\nq," + "x" * 500_000 + "\n")
    before = csv.field_size_limit()
    (row,) = read_rows(str(path))
    assert len(row.values["answer"]) == 500_000
    assert csv.field_size_limit() == before


def test_csv_rows_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "lines.csv"
    strange = "a\u2028b\x0cc\x85d\x1ce"
    path.write_bytes(f'question,answer\r\nq,{strange}\r\n"two\r\nlines",z\r\n'.encode())
    assert [(row.values, row.where) for row in read_rows(str(path))] == [
        ({"question": "q", "answer": strange}, f"{path}:2"),
        ({"question": "two\nlines", "answer": "z"}, f"{path}:4"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a"},
        {"instruction": "q", "input": "", "output": "a"},
    ],
)
def test_formats_are_recognized(row: dict[str, object]) -> None:
    record = parse(Row(row, "x:1"))
    assert isinstance(record, Conversation)
    assert [(m.role, m.content) for m in record.messages] == [("user", "q"), ("assistant", "a")]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f'q, "{n}"\n\u2028', "answer": f"a{n}"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert [row.values for row in read_rows(str(tmp_path / name))] == rows, name
    (tmp_path / "d.csv").write_text('question,answer\n"q, ""0""",a0\n')
    assert [row.values for row in read_rows(str(tmp_path / "d.csv"))] == [{"question": 'q, "0"', "answer": "a0"}]


def test_directories_and_globs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "one.txt").write_text("first")
    (tmp_path / "sub" / "two.md").write_text("second")
    assert [parse(row) for row in read_rows(str(tmp_path))] == [
        Text("first", str(tmp_path / "one.txt")),
        Text("second", str(tmp_path / "sub/two.md")),
    ]
    assert len(list(read_rows(str(tmp_path / "*.txt")))) == 1
    with pytest.raises(DataError, match="no data file found"):
        list(read_rows(str(tmp_path / "*.jsonl")))
    with pytest.raises(DataError, match="no such data file"):
        list(read_rows(str(tmp_path / "absent.jsonl")))
