"""Files of every kind: rows with their place, a piece at a time, and broken ones with file, line, reason and fix."""

from __future__ import annotations

import csv
import gzip
import json
import os
import socket
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from finetune.config.data import FileSource
from finetune.data.files import data_files
from finetune.data.formats import Conversation, Text, parse
from finetune.data.sources import Row, read_rows
from finetune.errors import DataError


def found(path: Path | str) -> list[Row | DataError]:
    return list(read_rows(FileSource(source=str(path))))


def rows_of(path: Path | str) -> list[Row]:
    """The rows, none of which may be bad."""
    rows = []
    for row in read_rows(FileSource(source=str(path))):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    return rows


DEEP = "[" * 100_000 + "]" * 100_000
BAD = {
    "truncated.jsonl": ('{"text": "ok"}\n{"text": "cut', ":2", "not valid JSON"),
    "list-row.jsonl": ("[1, 2]\n", ":1", "must be an object"),
    "object.json": ('{"text": "a"}', "object.json:1", "one list of objects"),
    "broken.json": ('[{"text": "a"},\n{"text" "b"}]', ":2", "not valid JSON"),
    "ragged.csv": ("question,answer\na,b\nc\n", ":3", "as many columns"),
    "open.csv": ('question,answer\na,"b\n\nc,d\n', ":2", "not valid CSV"),
    "blank-ragged.csv": ("question,answer\na,b\n\nc\n", ":4", "as many columns"),
    "deep.jsonl": (f'{{"text": "ok"}}\n{{"text": {DEEP}}}\n', ":2", "nested too deeply"),
    "deep.json": (f'[{{"text": "ok"}},\n{{"text": {DEEP}}}]', ":2", "nested too deeply"),
    "only-deep.json": (DEEP, ":1", "nested too deeply"),
    "twice.jsonl": ('{"text": "ok"}\n{"text": "a", "text": "b"}\n', ":2", "the key 'text' stands more than once"),
    "twice.json": ('[\n{"text": "ok"},\n\n{"text": "a", "text": "b"}]', ":4 row 2", "the key 'text' stands more than once"),
    "twice-object.json": ('\n{"text": "a", "text": "b"}', ":2", "the key 'text' stands more than once"),
    "twice-inside.jsonl": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "a", "content": "b"}]}',
        ":1",
        "the key 'content' stands more than once",
    ),
    "digits.json": ('[{"text": "ok"},\n{"text": ' + "1" * 5000 + "}]", ":2 row 2", "not readable JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_broken_files_name_their_line(tmp_path: Path, name: str) -> None:
    text, place, what = BAD[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        rows_of(path)
    problem = caught.value.problems[0]
    assert what in problem.what
    assert problem.where.endswith(place)
    assert str(path) in problem.where
    assert problem.fix


def test_wrong_encoding_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="UTF-8") as caught:
        rows_of(path)
    assert caught.value.problems[0].where.endswith(":2")


def test_half_a_surrogate_pair_in_an_unknown_row_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text(r'{"body": "a \ud800"}')
    with pytest.raises(DataError, match="no known format") as caught:
        [parse(row) for row in rows_of(path)]
    assert r"a \ud800" in str(caught.value).encode().decode()


def test_csv_fields_are_as_long_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("question,answer\nq," + "x" * 500_000 + "\n")
    before = csv.field_size_limit()
    (row,) = rows_of(path)
    assert len(row.values["answer"]) == 500_000
    assert csv.field_size_limit() == before


def test_csv_rows_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "lines.csv"
    strange = "a\u2028b\x0cc\x85d\x1ce"
    path.write_bytes(f'question,answer\r\nq,{strange}\r\n"two\r\nlines",z\r\n'.encode())
    assert [(row.values, row.where) for row in rows_of(path)] == [
        ({"question": "q", "answer": strange}, f"{path}:2"),
        ({"question": "two\nlines", "answer": "z"}, f"{path}:3"),  # where it begins
    ]


ROWS = [{"question": f'q, "{n}"\n\u2028', "answer": f"a{n}"} for n in range(3)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in ROWS).encode()


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """``rows`` in the kind of file that the name tells."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    match "".join(path.suffixes):
        case ".jsonl":
            path.write_bytes(lines)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case ".jsonl.zst":
            path.write_bytes(pyarrow.compress(lines, codec="zstd", asbytes=True))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case _:
            write_table(path, rows)
    return path


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as text:
            writer = csv.writer(text, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writerows([["question", "answer"], *([row["question"], row["answer"]] for row in rows)])
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2000)
    else:
        new = pyarrow.ipc.new_file if ".file" in path.suffixes else pyarrow.ipc.new_stream
        with path.open("wb") as binary, new(binary, table.schema) as stream:
            stream.write_table(table, 1000)


KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.file.arrow"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    assert [row.values for row in rows_of(path)] == ROWS


@pytest.mark.parametrize("name", KINDS)
def test_every_byte_on_disk_is_counted_once(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"question": f"q{n}", "answer": "a" * (n % 700)} for n in range(9000)])
    steps: list[int] = []
    assert sum(1 for _ in read_rows(FileSource(source=str(path)), steps.append)) == 9000
    assert sum(steps) == pytest.approx(path.stat().st_size, rel=0.01)
    assert min(steps) >= 0


@pytest.mark.parametrize("name", KINDS)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    # Arrow's own buffers are not seen here; batches bound them.
    peaks = []
    for count in (10_000, 30_000):
        path = write(tmp_path / name, [{"question": f"question {n} " + "x" * 200, "answer": "a"} for n in range(count)])
        tracemalloc.start()
        assert sum(1 for _ in read_rows(FileSource(source=str(path)))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        path.unlink()
    assert peaks[1] <= 1.1 * peaks[0] + 65_536


def test_a_line_of_any_length_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(200 * 2**20)  # a hole: no disk is used
        file.seek(0, os.SEEK_END)
        file.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    error, row = found(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "longer than 8 MiB" in str(error)
    assert row == Row({"text": "after"}, f"{path}:2")
    assert peak < 40 * 2**20


GOOD, BROKEN = '{"text": "ok"}', '{"text": }'


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("a.jsonl", f"{GOOD}\n{BROKEN}\n{GOOD}\n[1]\n\n{GOOD}\n", [":1", "!:2", ":3", "!:4", ":6"]),
        (
            "a.json",
            f'[{GOOD},\n3,\n{{"a": 1, "a": 2}},\n{{"a": NaN}}, {GOOD}]',
            [":1 row 1", "!:2 row 2", "!:3 row 3", "!:4 row 4", ":4 row 5"],
        ),
        ("a.csv", 'text,b\na,b\nc\n"x"y,z\n"two\nlines",z\n1,2,3\nd,e\n', [":2", "!:3", "!:4", ":5", "!:7", ":8"]),
        ("b.csv", 'text,b\na,b\n"two\nli"x,c\nd,e\n', [":2", "!:3"]),
        ("a.tsv", 'text\tb\na\tb\nc\n"x, y"\tz\n', [":2", "!:3", ":4"]),
    ],
)
def test_reading_goes_on_after_a_bad_row_where_the_next_can_be_told(tmp_path: Path, name: str, text: str, places: list[str]) -> None:
    path = tmp_path / name
    path.write_text(text)
    shown = [f"!{row.problems[0].where}" if isinstance(row, DataError) else row.where for row in found(path)]
    assert [place.replace(str(path), "") for place in shown] == places


def test_bytes_that_are_no_text_spoil_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "\xe9"}\r\n{"text": "\0"}\r\n{"text": "b"}')
    assert [type(row) for row in found(path)] == [Row, DataError, DataError, Row]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\r\na\r\n\xe9\r\nb\r\n")
    rows = found(path)
    assert [type(row) for row in rows] == [Row, DataError, Row]
    assert rows[0] == Row({"text": "a"}, f"{path}:2")


def test_a_cut_off_archive_gives_its_rows_up_to_the_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", [{"text": os.urandom(300).hex()} for _ in range(9000)])
    path.write_bytes(path.read_bytes()[:-1000])
    *rows, last = found(path)
    assert len(rows) > 5000
    assert all(isinstance(row, Row) for row in rows)
    assert isinstance(last, DataError)
    assert last.problems[0].where == f"{path}:{len(rows) + 1}"
    assert "cut off" in last.problems[0].what


def test_json_objects_that_end_where_a_piece_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"text": "é" * (2**19 - 20 + n)} for n in range(12)] + [{"text": "x" * 5_000_000}]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2))
    read = rows_of(path)
    assert [row.values for row in read] == rows
    assert [row.where for row in read] == [f"{path}:{2 + 3 * n} row {n + 1}" for n in range(13)]


def test_large_rows_of_a_table_are_cut_into_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = ["x" * 5_000_000, "y" * 9_000_000, "z", "w" * 5_000_000]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    rows = found(path)
    assert [row.values["text"] for row in rows if isinstance(row, Row)] == [texts[0], "z", texts[3]]
    assert isinstance(rows[1], DataError)
    assert rows[1].problems[0].where == f"{path} row 2"


def _calling(name: str, arguments: dict[str, object]) -> dict[str, object]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    tool = {"type": "function", "function": {"name": name, "parameters": {"properties": {key: {"type": "string"} for key in arguments}}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": turns, "functions": [tool]}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_keys_that_a_table_adds_to_tool_calls_are_taken_out(tmp_path: Path, name: str) -> None:
    rows = [_calling("weather", {"city": "Berlin", "days": [1, None]}), _calling("clock", {"zone": "CET"})]
    write_table(tmp_path / name, rows)
    for row, record in zip(rows, [parse(row, "chat", {"tools": "functions"}) for row in rows_of(tmp_path / name)], strict=True):
        expected = parse(Row(row, record.where), "chat", {"tools": "functions"})
        assert record == expected


def test_null_in_the_arguments_of_a_json_row_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(_calling("weather", {"city": None})) + "\n")
    record = parse(rows_of(path)[0])
    assert isinstance(record, Conversation)
    assert record.messages[1].tool_calls[0]["function"]["arguments"] == {"city": None}


def test_times_out_of_range_spoil_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    times = pyarrow.array([1, 2**62, 3], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "when": times}), path)
    first, bad, last = found(path)
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert isinstance(bad, DataError)
    assert "out of range" in bad.problems[0].what
    assert bad.problems[0].where == f"{path} row 2"


def test_times_in_a_zone_that_is_not_known_are_no_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    times = pyarrow.array([1], pyarrow.timestamp("us", tz="Mars/Phobos"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "when": times}), path)
    (bad,) = found(path)
    assert isinstance(bad, DataError)
    assert "'Mars/Phobos', which is not known here" in bad.problems[0].what
    assert "column" in bad.problems[0].fix


def test_no_terminal_obeys_the_excerpt_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": \x1b[2J\u202e\x9b}\n')
    (bad,) = found(path)
    assert isinstance(bad, DataError)
    assert bad.problems[0].excerpt == r'{"text": \x1b[2J\u202e\x9b}'


def test_directories_and_globs(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "one.txt").write_text("first\r\nline\r")
    (tmp_path / "sub" / "two.md").write_text("second")
    for hidden in (".hidden.txt", "sub/.git/config.txt"):
        (tmp_path / hidden).write_text("hidden")
    assert [parse(row) for row in rows_of(tmp_path)] == [
        Text("first\nline\n", str(tmp_path / "one.txt")),
        Text("second", str(tmp_path / "sub/two.md")),
    ]
    assert len(rows_of(tmp_path / "*.txt")) == 1
    assert len(rows_of(tmp_path / "**" / "*.*")) == 2
    with pytest.raises(DataError, match="no data file found"):
        rows_of(tmp_path / "*.jsonl")
    with pytest.raises(DataError, match="no such data file"):
        rows_of(tmp_path / "absent.jsonl")
    (tmp_path / "[x].txt").write_text("a name with brackets")
    assert len(rows_of(tmp_path / "[x].txt")) == 1


def test_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("outside")
    (tmp_path / "elsewhere" / "c.txt").write_text("there as well")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    assert [row.where for row in rows_of(tmp_path / "data")] == [f"{tmp_path}/data/b.txt", f"{tmp_path}/data/link/c.txt"]
    (tmp_path / "data" / "broken.txt").symlink_to(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="no such data file"):
        rows_of(tmp_path / "data")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: (path / "a.md").write_text("x"), r"documents \(a.md\) and rows \(rows.jsonl\)"),
        (lambda path: (path / "a.docx").write_text("x"), "unknown kind of file '.docx'"),
        (lambda path: os.mkfifo(path / "pipe.jsonl"), "not a regular file"),
        (lambda path: (path / "zero.jsonl").symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: (path / "dataset_dict.json").write_text("{}"), "several splits of a saved dataset"),
    ],
)
def test_directories_that_hold_something_else(tmp_path: Path, make: Callable[[Path], object], what: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(JSONL)
    make(tmp_path)
    with pytest.raises(DataError, match=what) as caught:
        data_files(FileSource(source=str(tmp_path)))
    assert caught.value.problems[0].fix


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(DataError, match="cannot be opened"):
        rows_of(path)


def test_a_saved_dataset_gives_the_files_of_its_state(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"the result of another step")
    assert [row.values for row in rows_of(tmp_path / "saved")] == ROWS
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="the state of a saved dataset cannot be read"):
        rows_of(tmp_path / "saved")


@pytest.fixture
def no_socket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any connection is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return


@pytest.mark.usefixtures("no_socket")
@pytest.mark.parametrize("name", KINDS)
def test_c7_no_url_of_a_row_is_fetched(tmp_path: Path, name: str) -> None:
    url = "http://127.0.0.1:9/x.jsonl"
    rows = rows_of(write(tmp_path / name, [{"question": f"![image]({url})", "answer": url}]))
    assert parse(rows[0])
    image = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    with pytest.raises(DataError, match="image_url"):
        parse(Row(image, "x:1"))


@pytest.mark.usefixtures("no_socket")
@pytest.mark.parametrize("source", ["$(touch ran).jsonl", "`touch ran`.jsonl", "http://127.0.0.1:9/x.jsonl", "| touch ran"])
def test_c7_a_source_is_a_name_and_never_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such data file"):
        rows_of(source)
    assert not [*tmp_path.iterdir()]
