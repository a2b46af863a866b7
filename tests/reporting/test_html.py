"""The page is whole, escaped and loads nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.reporting.html import Curve, chart, write_report
from finetune.runs import RunDirectory

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.config.write_text(f"model: {HOSTILE}\n")
    run.environment.write_text(json.dumps({"started": "today", "seed": 0, "machine": {"name": HOSTILE}, "versions": {"python": "3"}}))
    data = {"train": {"examples": 3, "tokens": 1000, "supervised": 500}}
    run.plan.write_text(json.dumps({"steps": {"total": 2}, "data": data}))
    rows = [{"kind": "step", "step": n, "loss": 2.0 / n, "learning_rates": {HOSTILE: 0.1}, "tokens": 10, "seconds": 1.0} for n in (1, 2)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"kind": "evaluation", "step": 2, "validation_loss": 1.5}]))
    run.evaluations.mkdir()
    figure = {
        "task": "loss",
        "name": "validation: loss",
        "unit": "nats/token",
        "n": 3,
        "values": {"base": 2.0, "tuned": 1.0},
        "better": "lower",
    }
    sample = {"kind": "control", "question": HOSTILE, "expected": "x", "answers": {"base": HOSTILE, "tuned": "y"}}
    results = {"run": "r", "systems": ["base", "tuned"], "figures": [figure], "samples": [sample], "seconds": 1.0}
    (run.evaluations / "results.json").write_text(json.dumps(results))
    return run


def test_c10_text_of_models_and_data_is_escaped(run: RunDirectory) -> None:
    page = write_report(run).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4


def test_the_page_loads_nothing(run: RunDirectory) -> None:
    page = write_report(run).read_text()
    assert not re.findall(r"""(?:src|href)\s*=|url\(|https?://""", page)
    assert "default-src 'none'" in page


def test_the_page_shows_the_figures_and_curves(run: RunDirectory) -> None:
    page = write_report(run).read_text()
    assert page.count("<svg") == 3
    assert "2.000" in page
    assert "1.000" in page


def test_a_run_that_has_only_begun_has_a_page_too(run: RunDirectory) -> None:
    run.metrics.unlink()
    (run.evaluations / "results.json").unlink()
    page = write_report(run).read_text()
    assert "Not evaluated yet" in page
    assert "<svg" not in page


def test_the_chart_spans_its_values() -> None:
    drawn = chart([Curve("a", ((0, 1.0), (10, 3.0))), Curve("b", ((5, 2.0),))])
    points = [tuple(map(float, pair.split(","))) for pair in re.findall(r'points="([^"]+)"', drawn)[0].split()]
    assert points[0][0] < points[1][0]
    assert points[0][1] > points[1][1]
    assert chart([]) == ""
