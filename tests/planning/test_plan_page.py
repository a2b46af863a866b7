"""docs/plan.md: its commands run, and its tables are those of the code."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from finetune.cli import view
from finetune.cli.app import app
from finetune.config.load import load_config
from finetune.hardware import Machine
from finetune.planning.gpus import BY_SIZE
from finetune.planning.memory import PARTS
from finetune.planning.plan import make_plan

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
ROWS = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", PAGE, re.M))
COMMANDS = re.findall(r"^\$ finetune (plan .*)\n((?:[^$`].*\n)*)", PAGE, re.M)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_command_runs_and_shows_what_is_quoted(
    command: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(view, "out", view.Console(highlight=False, width=80))
    app(shlex.split(command), standalone_mode=False)
    printed = " ".join(capsys.readouterr().out.split())
    for line in shown.splitlines():
        assert line in printed, printed


def test_the_table_of_parts_is_that_of_the_estimate() -> None:
    assert {name: ROWS[name] for name in PARTS} == dict(PARTS)


def test_the_table_of_sizes_is_that_of_the_command() -> None:
    assert {int(size): ROWS[size] for size in ROWS if size.isdigit()} == BY_SIZE


def test_the_keys_are_those_of_the_plan() -> None:
    plan = make_plan(load_config(Path("configs/quickstart.yaml")).config, Machine("cpu", "a CPU", 2, 2**35, bf16=True), None)
    section = PAGE[PAGE.index("## As JSON") :]
    documented = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", section, re.M)))
    assert documented == [*json.loads(json.dumps(plan.as_dict()))]
