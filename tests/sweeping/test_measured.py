"""Results that hold more than a sweep's run: the run's own columns are found, and a sweep can tell that it should measure again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config.sweep import Case
from finetune.runs import RunDirectory
from finetune.sealed import sha256_of
from finetune.sweeping.carry_out import Outcome
from finetune.sweeping.measured import is_measured_alone, own_columns
from finetune.sweeping.table import _row

OWN = {"kind": "run", "run_id": "mine", "path": "/elsewhere/before/it/was/moved"}
OTHER = {"kind": "run", "run_id": "theirs", "path": "/other"}
MODEL = {"kind": "model", "path": "/m"}


def _base(of: str) -> dict[str, str]:
    return {"kind": "base", "of": of}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(tmp_path / "x")
    found.evaluations.mkdir(parents=True)
    found.environment.write_text(json.dumps({"run_id": "mine"}))
    return found


def _write(run: RunDirectory, systems: dict[str, Any], bases: dict[str, str] | None, *, record: bool = True) -> dict[str, Any]:
    """``systems`` in their order; the accuracy of each is its place in tenths."""
    values = {name: place / 10 for place, name in enumerate(systems)}
    change = {name: {"difference": 9.0, "low": 8.0, "high": 10.0, "p": 0.01, "verdict": "better"} for name in list(systems)[1:]}
    figure = {"task": "t", "name": "facts: accuracy", "unit": "share", "n": 9, "values": values, "better": "higher", "changes": change}
    found: dict[str, Any] = {"run": "r", "systems": list(systems), "figures": [figure], "samples": [], "seconds": 1.0}
    found |= {"record": {"systems": systems}} if record else {}
    found |= {"bases": bases} if bases is not None else {}
    run.results.write_text(json.dumps(found))
    return found


CASES = {
    "alone": ({"base": _base("tuned"), "tuned": OWN}, {"tuned": "base"}, ("base", "tuned"), True),
    "a model beside it": ({"base": _base("tuned"), "m": MODEL, "tuned": OWN}, {"tuned": "base"}, ("base", "tuned"), False),
    "another run, another base": (
        {"base": _base("o"), "base of x": _base("x"), "o": OTHER, "x": OWN},
        {"o": "base", "x": "base of x"},
        ("base of x", "x"),
        False,
    ),
    "another run alone": ({"base": _base("tuned"), "tuned": OTHER}, {"tuned": "base"}, None, False),
    "a model alone": ({"m": MODEL}, {}, None, False),
    "older": ({"base": _base("tuned"), "tuned": OWN}, None, ("base", "tuned"), True),
    "older, a model beside it": ({"base": _base("tuned"), "m": MODEL, "tuned": OWN}, None, ("base", "tuned"), False),
    "older, second of two bases": ({"base": _base("o"), "base of x": _base("x"), "o": OTHER, "x": OWN}, None, None, False),
    "older, first of two bases": ({"base": _base("x"), "base of o": _base("o"), "x": OWN, "o": OTHER}, None, ("base", "x"), False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_found_among_what_was_measured(run: RunDirectory, case: str) -> None:
    systems, bases, columns, alone = CASES[case]
    found = _write(run, systems, bases)
    assert own_columns(run, found) == columns
    assert is_measured_alone(run) is alone


def test_results_without_what_they_were_summed_from_are_half_written(run: RunDirectory) -> None:
    found = _write(run, *CASES["alone"][:2])
    run.items.parent.mkdir()
    run.items.write_text("{}")
    found["record"]["items"] = sha256_of(run.items)
    run.results.write_text(json.dumps(found))
    assert is_measured_alone(run)
    run.items.write_text('{"of": "another evaluation"}')
    assert not is_measured_alone(run)
    run.items.unlink()
    assert not is_measured_alone(run)


def test_results_without_a_record_are_those_of_the_run(run: RunDirectory) -> None:
    assert not is_measured_alone(run)
    assert own_columns(run, _write(run, {"base": {}, "tuned": {}}, None, record=False)) == ("base", "tuned")
    assert is_measured_alone(run)
    assert own_columns(run, _write(run, {"m": {}, "n": {}}, None, record=False)) is None


@pytest.mark.parametrize(("case", "shown"), [("a model beside it", (0.2, 0.0)), ("another run, another base", (0.3, 0.1))])
def test_the_table_of_a_sweep_shows_the_run_and_no_other_column(run: RunDirectory, case: str, shown: tuple[float, float]) -> None:
    _write(run, *CASES[case][:2])
    figure = _row(Outcome(Case("a", {}, run.path), None)).figures["facts: accuracy"]
    assert (figure.value, figure.base) == pytest.approx(shown)
    _write(run, *CASES["another run alone"][:2])
    assert _row(Outcome(Case("a", {}, run.path), None)).figures == {}
