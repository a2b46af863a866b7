"""What is printed: errors, notes with paths, next steps."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from finetune.cli import view
from finetune.cli.next_steps import next_steps
from finetune.config.schema import Full, Houlsby, Lora, Prefix, Prompt, Tuning
from finetune.errors import ConfigError, DataError, FinetuneError, Problem, RunInterruptedError
from finetune.runs import RunDirectory


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to stderr, a terminal of 60 columns."""
    stream = io.StringIO()
    monkeypatch.setattr(view, "err", Console(file=stream, width=60))
    return stream


def test_one_mistake_in_many_rows_is_told_once_in_order(printed: io.StringIO) -> None:
    same = [Problem("the answer is empty", f"data.csv:{row}", "fill it in", f"row {row}") for row in range(2, 14)]
    other = Problem("no role", "data.csv:3", "add one")
    view.show_error(DataError.from_problems([same[0], other, *same[1:]]))
    assert printed.getvalue().splitlines() == [
        "error: the answer is empty",
        "  where: 12 rows, first data.csv:2, data.csv:3, data.csv:4",
        "    row 2",
        "  fix:   fill it in",
        "error: no role",
        "  where: data.csv:3",
        "  fix:   add one",
    ]


def test_few_places_are_all_named(printed: io.StringIO) -> None:
    view.show_error(ConfigError.from_problems([Problem("too large", "a.yaml:1"), Problem("too large", "a.yaml:2")]))
    assert printed.getvalue() == "error: too large\n  where: 2 places, a.yaml:1, a.yaml:2\n"


@pytest.mark.parametrize(
    ("error", "label"),
    [(FinetuneError("x"), "error: x"), (RunInterruptedError("by a signal", signal_number=15), "interrupted: by a signal")],
)
def test_an_interruption_is_no_error(printed: io.StringIO, error: FinetuneError, label: str) -> None:
    view.show_error(error)
    assert printed.getvalue().splitlines()[0] == label


def test_a_path_is_never_broken(printed: io.StringIO) -> None:
    view.path(f"drawn in /{'folder/' * 20}plot.svg")
    assert printed.getvalue() == f"drawn in /{'folder/' * 20}plot.svg\n"


@pytest.mark.parametrize(
    ("tuning", "said", "merges"),
    [
        (Lora(method="lora"), "finetune merge runs/x -O DIR", True),
        (Full(method="full"), "the whole model lies in runs/x/model", False),
        (Prompt(method="prompt"), "load runs/x/adapter with peft.PeftModel", False),
        (Prefix(method="prefix"), "load runs/x/adapter with peft.PeftModel", False),
        (Houlsby(method="houlsby"), "load runs/x/adapter with finetune.model.adapters.load", False),
    ],
)
def test_only_what_is_possible_comes_next(tuning: Tuning, said: str, merges: bool) -> None:
    line = next_steps(RunDirectory(Path("runs/x")), tuning)
    assert line.startswith("next: finetune eval runs/x; ")
    assert said in line
    assert ("finetune merge" in line) == merges


def test_options_stay_on_one_line_where_text_is_wrapped() -> None:
    options = "-o distributed.strategy=fsdp -o train.tokens_per_device=8192 --devices 2"
    lines = view.wrapped(f"the smallest change: {options} (then 38.7 GiB of a device, which is less)", 4, 50).splitlines()
    assert [line.strip() for line in lines] == ["the smallest change:", options, "(then 38.7 GiB of a device, which is less)"]
    assert view.wrapped("one two three four five six seven eight nine ten", 2, 42).splitlines() == [
        "one two three four five six seven eight",
        "  nine ten",
    ]


def test_what_is_said_in_a_terminal_has_whole_words_and_an_indent(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(view, "err", Console(file=stream, width=60, force_terminal=True, color_system=None))
    path = f"/{'folder/' * 12}rows.jsonl"
    view.note(f"note: {path} does not exist yet, and nothing else is known of what will be in it")
    view.note("  tried bf16: it keeps no more than ninety percent of what was learned")
    view.show_error(ConfigError.from_problems([Problem("wrong", f"/{'folder/' * 6}{name}.yaml:1") for name in "abc"]))
    assert stream.getvalue().splitlines() == [
        "note: " + path,
        "      does not exist yet, and nothing else is known of what",
        "      will be in it",
        "  tried bf16: it keeps no more than ninety percent of what",
        "    was learned",
        "error: wrong",
        "  where: 3 places,",
        *(f"         /{'folder/' * 6}{name}.yaml:1{',' if name != 'c' else ''}" for name in "abc"),
    ]
