"""The command line as a whole: usage errors, help, documentation, output streams, a terminal of 80 columns."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from finetune.cli.app import app

ROOT = Path(__file__).parents[2]
Run = Callable[..., Any]


def commands() -> list[str]:
    """Every command with its group, such as ``config check``."""
    group = typer.main.get_command(app)
    found = []
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found += [f"{name} {sub}" for sub in inner] if inner else [name]
    return found


def test_every_command_has_help_and_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    reference = (ROOT / "docs" / "cli.md").read_text()
    assert len(commands()) >= 10
    for name in commands():
        assert f"`finetune {name}" in readme, name
        assert f"`finetune {name}`" in reference, name


@pytest.mark.parametrize("arguments", [["config", "chek"], ["eval"], ["train", "x.yaml", "--devices", "0"], ["--nonsense"]])
def test_usage_errors_exit_2_without_traceback(finetune: Run, arguments: list[str]) -> None:
    done = finetune(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.out == ""


def test_a_directory_that_is_no_run_is_named(finetune: Run, tmp_path: Path) -> None:
    wanted = "not a run directory"
    for arguments, said in (
        (["eval", tmp_path], "not a run (config.yaml and environment.json), an adapter"),
        (["merge", tmp_path, "-O", tmp_path / "m"], wanted),
        (["report", tmp_path], wanted),
    ):
        done = finetune(*arguments)
        assert done.code == 2, done.err
        assert said in done.err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "option", [["--seed", "1"], ["--rank", "8"], ["--to", "nf4", "--seed", "0"], ["--to", "adapter", "--rounding", "stochastic"]]
)
def test_an_option_of_merge_that_would_be_ignored_is_refused(finetune: Run, tmp_path: Path, option: list[str]) -> None:
    done = finetune("merge", tmp_path, "-O", tmp_path / "merged", *option)
    assert done.code == 2
    assert "has no meaning" in done.err
    assert not (tmp_path / "merged").exists()


def test_debug_shows_the_traceback(finetune: Run, tmp_path: Path) -> None:
    for arguments in (("--debug", "report", tmp_path), ("report", tmp_path, "--debug")):
        done = finetune(*arguments)
        assert "Traceback" in done.err
        assert done.code == 2


def test_json_leaves_stdout_to_json(finetune: Run, write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(train={"max_steps": 2, "precision": "fp32"})
    done = finetune("train", config, "--json")
    assert json.loads(done.out) == {"run": str(tmp_path / "run")}
    counted = json.loads(finetune("data", "stats", config, "--json").out)
    assert counted["counts"]["rows_read"] == 24
    assert counted["train"]["examples"] + counted["validation"]["examples"] == 24


def test_preview_marks_what_carries_loss(finetune: Run, write_config: Callable[..., Path]) -> None:
    shown = finetune("data", "preview", write_config(), "-n", "2", "--ids").out
    marked = re.findall(r"\[\[(.*?)\]\]", shown, re.S)
    assert len(marked) == 2
    assert all(text.startswith("Title") and text.endswith("<|im_end|>") for text in marked)


@pytest.mark.parametrize("columns", [80, 200])
def test_training_in_a_terminal_fits_its_width(
    write_config: Callable[..., Path], tmp_path: Path, terminal: Callable[..., list[str]], columns: int
) -> None:
    config = write_config(train={"epochs": 1, "batch_size": 8, "precision": "fp32"}, optimizer={"groups": {"mlp": {"lr_ratio": 2.0}}})
    lines = terminal(["train", str(config)], columns, tmp_path)
    text = "\n".join(lines)
    assert re.search(r"^step (\d+)/\1  100%  0:00 left", text, re.M), text
    for label in ("loss", "validation", "gradient", "rate", "speed", "memory"):
        assert len(re.findall(rf"^{label}  +\S", text, re.M)) == 1, text
    assert re.search(r"^rate +\(rest\) 2\.00e-04, mlp 4\.00e-04|^rate +mlp .*", text, re.M), text
    assert re.search(r"^mlp +\d+ +[\d,]+ +4\.00e-04 +0\.01$", text, re.M), text
    assert str(tmp_path / "run") in text.replace("\n", "")


def test_an_error_in_a_terminal_keeps_its_indent(tmp_path: Path, terminal: Callable[..., list[str]]) -> None:
    lines = [line for line in terminal(["train", "nothing.yaml"], 80, tmp_path) if line]
    assert lines[0] == "error: there is no such file"
    assert lines[1] == "  where: nothing.yaml"
    assert lines[2].startswith("  fix:   ")
    assert all(line.startswith("         ") for line in lines[3:])


def test_notes_and_errors_break_between_words_in_a_terminal_and_nowhere_in_a_pipe(
    tmp_path: Path, terminal: Callable[..., list[str]], finetune: Run
) -> None:
    path = tmp_path / "one.yaml"
    settings = "model: {id: a/b}\ntuning: {method: full}\noptimizer: {learning_rate: 0.001}\noutput: runs/x\n"
    path.write_text(settings + f"data: {{train: [{{source: {'folder/' * 9}rows.jsonl}}]}}\n")
    lines = [line for line in terminal(["config", "check", path.name], 80, tmp_path) if line]
    notes = [place for place, line in enumerate(lines) if line.startswith("note: ")]
    assert len(notes) == 2, lines
    assert lines[-1] == "one.yaml: valid"
    piped = [line for line in finetune("config", "check", path.name, cwd=tmp_path).err.splitlines() if line.startswith("note: ")]
    assert len(piped) == 2
    rate = lines[notes[1] : -1]
    assert len(rate) > 1
    assert all(line.startswith(" " * 6) for line in rate[1:]), rate
    assert " ".join(line.strip() for line in rate) == piped[1]
    assert piped[0].replace(" ", "") == "".join(lines[: notes[1]]).replace(" ", "")
