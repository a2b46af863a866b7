"""`finetune report`: what it writes, prints and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.conftest import write_run

Call = Callable[..., Any]


def test_a_page_of_one_run_lies_in_it(call: Call, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run").path
    done = call("report", run)
    assert done.code == 0
    assert str(run / "report.html") in done.out
    told = json.loads(call("report", run, "--json").out)
    assert told["report"] == str(run / "report.html")
    assert told["results"]["systems"] == ["base", "tuned"]


def test_evaluations_of_other_names_are_shown(call: Call, tmp_path: Path) -> None:
    """A run that was only evaluated with a configuration of its own was evaluated."""
    run = write_run(tmp_path / "run")
    (run.evaluations / "results.json").rename(run.evaluations / "mine.json")
    done = call("report", run.path)
    assert "not evaluated" not in done.out + done.err
    assert "eval/mine.json" in done.out
    assert "validation" in done.out
    told = json.loads(call("report", run.path, "--json").out)
    assert told["results"] is None
    assert told["evaluations"]["mine.json"]["systems"] == ["base", "tuned"]


def test_several_runs_go_where_it_is_said(call: Call, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name).path for name in ("a", "b")]
    page = tmp_path / "both.html"
    assert call("report", *runs, "-O", page).out == f"{page}\n"
    told = json.loads(call("report", *runs, "-O", page, "--json").out)
    assert [one["run"] for one in told["runs"]] == [str(run) for run in runs]
    refused = call("report", *runs)
    assert refused.code == 2
    assert "-O comparison.html" in refused.err
    assert not (runs[0] / "report.html").exists()


def test_pictures_are_listed(call: Call, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run").path
    told = json.loads(call("report", run, "--png", tmp_path / "png", "--json").out)
    assert {Path(path).name for path in told["png"]} == {path.name for path in (tmp_path / "png").iterdir()}
    assert len(told["png"]) == 6
    refused = call("report", run, "--png", run / "config.yaml")
    assert refused.code == 2
