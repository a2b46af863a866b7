"""`finetune data preview | stats` through the real command line: in a pipe, as JSON, in a terminal, and in error."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.cli import view
from finetune.cli.preview import Stretch, has_marks, marked, visible
from finetune.cli.training_view import TrainingView
from finetune.config.load import load_config
from finetune.errors import DataError
from finetune.training.metrics import Preparing

Run = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture
def messy(write_config: Write, tmp_path: Path) -> Path:
    """A configuration over rows with doubles, an over-long one, a tiny answer, damaged and control characters."""

    def row(question: str, answer: str) -> str:
        return json.dumps({"question": question, "answer": answer}) + "\n"

    rows = [row(f"Question number {number} about things?", f"The answer is {number} of them.") for number in range(12)]
    rows += [rows[3], row("long " * 300, "The answer."), row("tiny?", "a"), row("red \x1b[31m and \u200bhidden?", "This one is schÃ¶n.")]
    (tmp_path / "messy.jsonl").write_text("".join(rows))
    return write_config("messy.yaml", data={"train": [{"source": "messy.jsonl"}], "max_tokens": 128, "overlong": "drop"})


def preview(call: Run, config: Path, *arguments: str) -> list[dict[str, Any]]:
    done = call("data", "preview", config, "--json", *arguments)
    assert done.code == 0, done.err
    found: list[dict[str, Any]] = json.loads(done.out)["examples"]
    return found


# --- preview -------------------------------------------------------------------------------------------------------------------------


def test_an_example_is_exact_in_json_and_marked_in_a_pipe(call: Run, messy: Path) -> None:
    (example,) = preview(call, messy, "--index", "4", "--ids")
    assert example["where"] == str(messy.with_name("messy.jsonl")) + ":5"
    assert example["tokens"] == len(example["ids"]) == len(example["mask"])
    assert example["supervised"] == sum(example["mask"])
    assert [part["supervised"] for part in example["stretches"]][:2] == [False, True]
    assert "".join(part["text"] for part in example["stretches"] if part["supervised"]) == "The answer is 4 of them.<|im_end|>"
    text = call("data", "preview", messy, "--index", "4", "--ids").out
    assert text.startswith("training example 4 of 15: ")
    assert "[[The answer is 4 of them.<|im_end|>]]" in text
    assert ", ".join(map(str, example["ids"])) in text


def test_orders_choose_by_length_or_by_a_seeded_draw(call: Run, messy: Path) -> None:
    lengths = [example["tokens"] for example in preview(call, messy, "-n", "99")]
    assert len(lengths) == 15
    for order, expected in (("longest", sorted(lengths, reverse=True)), ("shortest", sorted(lengths))):
        assert [example["tokens"] for example in preview(call, messy, "-n", "4", "--order", order)] == expected[:4]
    one, again, other = (preview(call, messy, "--order", "random", "--seed", seed, "-n", "6") for seed in ("1", "1", "2"))
    assert one == again != other


def test_c10_a_terminal_obeys_no_character_of_the_data(call: Run, messy: Path) -> None:
    out = call("data", "preview", messy, "-n", "99").out
    assert "\x1b" not in out
    assert "␛[31m" in out
    assert "\\u200bhidden" in out
    exact = preview(call, messy, "--index", "14")[0]
    assert "red \x1b[31m and \u200bhidden?" in exact["stretches"][0]["text"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb é☃漢", "a\nb é☃漢"),
        ("a\tb\r", "a␉b␍"),
        ("\x7f\x9b", "␡\\u009b"),
        ("\u202eevil", "\\u202eevil"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_has_no_shape_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_validation_examples_are_shown_on_request(call: Run, write_config: Write) -> None:
    config = write_config()
    training, validation = (json.loads(call("data", "preview", config, "--json", *side).out) for side in ((), ("--validation",)))
    assert (training["side"], validation["side"]) == ("training", "validation")
    assert training["of"] + validation["of"] == 24
    assert not {example["where"] for example in training["examples"]} & {example["where"] for example in validation["examples"]}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--index", "15"], "there is no training example 15"),
        (["--index", "1", "-n", "3"], "so -n would do nothing"),
        (["--index", "1", "--order", "longest"], "so --order would do nothing"),
        (["--seed", "3"], "--seed is the draw of"),
        (["--validation"], "there is no validation data"),
    ],
)
def test_options_that_would_do_nothing_are_refused(call: Run, messy: Path, arguments: list[str], what: str) -> None:
    done = call("data", "preview", messy, *arguments, "--json")
    assert done.code == 2
    assert done.out == ""
    assert what in done.err


# --- stats ---------------------------------------------------------------------------------------------------------------------------


def test_stats_say_what_was_found(finetune: Run, messy: Path) -> None:
    done = finetune("data", "stats", messy.name, cwd=messy.parent, COLUMNS="80")
    assert done.code == 0, done.err
    assert all(len(line) <= 80 for line in done.out.splitlines()), done.out
    assert re.search(r"messy\.jsonl +16 +15 +[\d,]+ +\d+\.\d% +1\n", done.out), done.out
    assert "1 of 16 rows longer than max_tokens in messy.jsonl: 1 dropped" in done.out
    for finding in ("1 duplicate rows", "1 tiny answers", "1 damaged encoding", "1 control characters"):
        assert re.search(rf"^  {finding}$", done.out, re.M), done.out
    assert re.search(r"messy\.jsonl:13 and .*messy\.jsonl:4", done.out.replace("\n", "")), done.out
    assert "padding:" in done.out


def test_plain_text_needs_no_more_tokens(call: Run, write_config: Write, chat_file: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A sentence about things. " * 100)
    sources = [{"source": str(chat_file)}, {"source": str(tmp_path / "book.txt")}]
    text = call("data", "stats", write_config(data={"train": sources, "max_tokens": 256})).out
    assert re.search(r"the longest conversation has \d+ tokens", text), text
    assert "plain text is cut into blocks of max_tokens anyway, the longest block has 256" in " ".join(text.split())


def test_stats_in_json_are_the_report(call: Run, messy: Path) -> None:
    found = json.loads(call("data", "stats", messy, "--json").out)
    (source,) = found["sources"]
    assert (source["rows"], source["examples"], source["over_long"], source["dropped"]) == (16, 15, 1, 1)
    assert found["train"]["examples"] == 15
    assert found["fit"]["over_long"] == pytest.approx(1 / 16)
    assert 0.0 <= found["fit"]["padding"] < 1.0
    assert {finding["name"]: finding["count"] for finding in found["findings"]}["duplicate rows"] == 1
    assert re.fullmatch("[0-9a-f]{64}", found["fingerprint"])
    names = [*found, *found["counts"], *found["fit"], *found["dropped"]]
    assert all(re.fullmatch("[a-z][a-z0-9_]*", name) for name in names), names
    assert found["counts"]["rows_read"] == 16


def test_bad_data_leaves_stdout_empty(finetune: Run, call: Run, messy: Path) -> None:
    for run, command in ((finetune, ["stats", messy, "--json"]), (call, ["stats", messy]), (call, ["preview", messy, "--json"])):
        done = run("data", *command, "-o", "data.overlong=error")
        assert done.code == 3
        assert done.out == ""
        assert "messy.jsonl:14" in done.err


def test_a_terminal_shows_stats_in_its_width(messy: Path, tmp_path: Path, terminal: Callable[..., list[str]]) -> None:
    text = "\n".join(terminal(["data", "stats", str(messy)], 80, tmp_path))
    assert re.search(r"^messy\.jsonl +16 +15 +[\d,]+ +\d+\.\d% +1$", text, re.M), text
    assert re.search(r"^ +\d+ - +\d+ +\d+ █+$", text, re.M), text
    assert "preparing data" not in text  # the bar is gone


def test_a_terminal_shows_no_marks_but_colour(messy: Path, tmp_path: Path, terminal: Callable[..., list[str]]) -> None:
    text = "\n".join(terminal(["data", "preview", str(messy), "-n", "1"], 80, tmp_path))
    assert "The answer is 0 of them." in text
    assert "[[" not in text


def test_without_colour_loss_is_marked() -> None:
    parts = [Stretch("asked", False), Stretch("told\x07", True)]
    assert marked(parts, colour=False).plain == "asked[[told␇]]"
    brackets = [Stretch("a[[0]", False), Stretch("]b [1]]", True)]
    assert marked(brackets, colour=False).plain == "a\\[\\[0\\][[\\]b [1\\]\\]]]"
    assert has_marks(brackets)
    assert not has_marks(parts)
    coloured = marked(parts, colour=True)
    assert coloured.plain == "askedtold␇"
    assert [str(span.style) for span in coloured.spans] == ["dim", "green"]


# --- the bar -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_terminal", [True, False])
def test_preparation_shows_a_bar_in_a_terminal_only(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(view, "err", Console(file=stream, force_terminal=is_terminal, width=80))
    with view.preparing() as progress:
        assert stream.getvalue() == ""  # nothing to prepare, nothing to show
        progress("reading", 512, 1024)
        progress("comparing rows", 0, 0)
    shown = stream.getvalue()
    assert ("preparing data: reading" in shown) == is_terminal
    assert ("preparing data: comparing rows" in shown) == is_terminal


def test_training_takes_the_bar_down_when_preparation_fails(monkeypatch: pytest.MonkeyPatch, write_config: Write) -> None:
    monkeypatch.setattr(view, "err", Console(file=io.StringIO(), force_terminal=True, width=80))
    watching = TrainingView(load_config(write_config()).config)
    with suppress(DataError), watching.running():
        watching(Preparing("reading", 1, 2))
        assert watching._preparation._progress.live.is_started
        raise DataError("a bad row")
    assert not watching._preparation._progress.live.is_started
