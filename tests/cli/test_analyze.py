"""`finetune analyze` as a user runs it: tables, JSON, plots, exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, chat_file: Path, train_here: Callable[..., Path]
) -> tuple[Path, Path]:
    """Two finished runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("runs")

    def run(seed: int) -> Path:
        config = {
            "model": {"id": str(tiny_model_dir)},
            "tuning": {"method": "lora", "rank": 4, "alpha": 8},
            "data": {"train": [{"source": str(chat_file)}], "validation": {"fraction": 0.2}, "max_tokens": 256},
            "train": {"epochs": 1, "batch_size": 8, "precision": "fp32", "tokens_per_device": 256},
            "seed": seed,
            "output": str(folder / f"seed-{seed}"),
        }
        (folder / f"{seed}.yaml").write_text(json.dumps(config))
        return train_here(folder / f"{seed}.yaml")

    return run(0), run(1)


def test_a_run_is_summarized_in_80_columns_without_marks_in_a_pipe(finetune: Callable[..., Any], runs: tuple[Path, Path]) -> None:
    done = finetune("analyze", runs[0], COLUMNS="80")
    assert done.code == 0, done.err
    title, head, *rows = done.out.splitlines()
    assert title == f"{runs[0]}: lora, update s BA of 14 matrices"
    assert head.split() == ["module", "layers", "|dW|/|W|", "largest", "in", "layer", "eff.", "rank", "of", "top", "sv", "amplif."]
    assert {row.split()[0] for row in rows if row.strip()} == {f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    means = [float(row.split()[2]) for row in rows if row.strip()]
    assert means == sorted(means, reverse=True)
    assert all(len(line) <= 80 for line in done.out.splitlines()[1:])
    assert "\x1b" not in done.out


def test_layers_and_a_plot_of_two_runs(finetune: Callable[..., Any], runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = finetune("analyze", *runs, "--layers", "--plot", tmp_path / "plot.svg", COLUMNS="80")
    assert done.code == 0, done.err
    assert done.out.count("q_proj") == 2 * 2 + 2 * 2  # two layers in each of two runs, and by A and by update in the comparison
    assert "phi(1)" in done.out
    assert "chance(4)" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines() if str(runs[0].parent) not in line)
    assert "began with the same A" not in done.err  # they differ in their seed
    assert f"drawn in {tmp_path / 'plot.svg'}" in done.err
    drawn = ElementTree.parse(tmp_path / "plot.svg")
    titles = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"q_proj: effective rank", "q_proj, A: seed-0 | seed-1"} <= titles


def test_json_is_all_that_stdout_holds(finetune: Callable[..., Any], runs: tuple[Path, Path]) -> None:
    done = finetune("analyze", *runs, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [len(run["modules"]) for run in found["runs"]] == [14, 14]
    module = found["runs"][0]["modules"][0]
    assert {"module", "kind", "layer", "singular_values", "effective_rank", "relative_norm", "amplification"} <= set(module)
    assert [module["layer"] for module in found["runs"][0]["modules"]] == [0] * 7 + [1] * 7
    similarity = found["pairs"][0]["similarities"][0]
    assert similarity["sizes"] == [1, 4]
    assert len(similarity["phi"]) == 2


def test_the_spectrum_of_a_model_needs_no_run(finetune: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"FINETUNE_CACHE": str(tmp_path / "cache"), "COLUMNS": "80"}
    done = finetune("analyze", tiny_model_dir, "--spectrum", "--plot", tmp_path / "plot.html", **options)
    assert done.code == 0, done.err
    _, head, *rows = [line for line in done.out.splitlines() if line.strip()]
    assert head.split() == ["layer", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    assert done.out.count("*") == 7  # one of the two layers of each type
    assert all(len(line) <= 80 for line in done.out.splitlines()[1:])
    assert (tmp_path / "plot.html").read_text().startswith("<!doctype html>")

    done = finetune("analyze", tiny_model_dir, "--spectrum", "--share", "1", "--json", **options)
    found = json.loads(done.out)
    assert found["share"] == 1.0
    assert len(found["modules"]) == 14
    assert all(row["chosen"] and row["place"] in (1, 2) for row in found["modules"])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["{model}"], "not a run directory"),
        (["no-owner/no-such-model", "--spectrum"], "cannot be reached"),
        (["{model}", "{model}", "--spectrum"], "measures one model"),
        (["{model}", "--spectrum", "--layers"], "shows every layer already"),
        (["{model}", "--spectrum", "--share", "1.5"], "share of 1.5"),
        (["{run}", "--share", "0.5"], "--share chooses layers of a model"),
        (["{run}", "{run}"], "named twice"),
        (["{run}", "--plot", "{folder}/plot.png"], "an .svg or .html file"),
        (["{run}", "--plot", "{folder}/none/plot.svg"], "does not exist"),
        (["{unfinished}"], "the run is not finished"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(
    arguments: list[str],
    what: str,
    finetune: Callable[..., Any],
    runs: tuple[Path, Path],
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs[0], unfinished)
    shutil.rmtree(unfinished / "adapter")
    places = {"run": runs[0], "model": tiny_model_dir, "folder": tmp_path, "unfinished": unfinished}
    done = finetune("analyze", *(argument.format(**places) for argument in arguments), FINETUNE_CACHE=str(tmp_path / "cache"))
    assert done.code == 2, done.err
    assert what in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_what_can_be_refused_at_once_loads_nothing(runs: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from finetune import api; from finetune.errors import ConfigError\n"
        "try: api.analyze([pathlib.Path(sys.argv[1])], pathlib.Path(sys.argv[2]))\n"
        "except ConfigError: sys.exit(3 if 'torch' in sys.modules else 0)\n"
        "sys.exit(4)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(runs[0]), str(tmp_path / "plot.png")], check=False)
    assert done.returncode == 0


def test_a_damaged_run_is_exit_code_6(finetune: Callable[..., Any], runs: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    done = finetune("analyze", tmp_path / "run")
    assert done.code == 6, done.err
    assert "not the file that was saved" in done.err
