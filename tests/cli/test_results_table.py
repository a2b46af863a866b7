"""The table of an evaluation: value, interval, change and verdict, within 80 columns."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from finetune.cli.results_table import results_table, told_apart, value
from finetune.evaluation.results import Change, Figure, Headline, Results, read_results
from finetune.runs import RunDirectory

BETTER = Change(-2.83, -3.2, -2.4, 0.0002, "better")
NONE = Change(0.05, -0.1, 0.2, 0.6, "no difference seen with n=24")


def _results(*systems: str, pair: tuple[str, str] = ("base", "tuned")) -> Results:
    names = (*pair, *systems)
    arm = "trained as documents and questions"
    figures = (
        Figure(
            "knowledge",
            f"{arm}: answer loss",
            "nats/token",
            24,
            {name: 5.1 - place for place, name in enumerate(names)},
            "lower",
            {name: (4.6 - place, 5.5 - place) for place, name in enumerate(names)},
            dict.fromkeys(names[1:], BETTER),
        ),
        Figure(
            "knowledge",
            f"{arm}: choice of four, titles of the arm",
            "share",
            24,
            dict.fromkeys(names, 0.0),
            "higher",
            dict.fromkeys(names, (0.0, 0.14)),
            dict.fromkeys(names[1:], NONE),
        ),
    )
    headlines = (Headline("substance", "answer loss", "nats/token", "lower", names[1], BETTER),)
    return Results("run", names, figures, (), 1.0, (), headlines)


def _lines(results: Results) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=80).print(results_table(results))
    return stream.getvalue().splitlines()


def test_two_systems_have_change_and_verdict_in_columns_of_their_own() -> None:
    lines = _lines(_results())
    assert max(map(len, lines)) <= 80
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "measured base tuned change verdict" in text
    assert "trained as documents and" in text
    assert "n=24" in text
    assert "5.10 ±0.45 4.10 ±0.45 -2.83 ±0.40 better" in text
    assert "0.000 ≤0.140 0.000 ≤0.140" in text
    assert "no difference" in text
    assert "what tuned learned" in text


@pytest.mark.parametrize(
    "others", [("merged",), ("a run of the first of three seeds", "runs/seed-2", "runs/seed-3")], ids=["three systems", "five, long names"]
)
def test_more_systems_have_a_line_each_below_what_was_measured(others: tuple[str, ...]) -> None:
    lines = _lines(_results(*others))
    assert max(map(len, lines)) <= 80
    text = [" ".join(line.split()) for line in lines]
    assert text[0] == "measured value change verdict"
    measured = text.index("answer loss (nats/token)")
    assert text[measured + 1 : measured + 3] == ["base 5.10 ±0.45", "tuned 4.10 ±0.45 -2.83 ±0.40 better"]
    for place, name in enumerate(others, 2):
        assert text[measured + 1 + place] == f"{name} {5.1 - place:.2f} ±0.45 -2.83 ±0.40 better"
    assert "choice of four, titles of the arm" in text
    assert "substance, answer loss -2.83 ±0.40 better" in " ".join(text).replace(" (nats/token)", "")


def test_two_systems_with_long_names_do_not_take_the_place_of_what_was_measured() -> None:
    lines = _lines(_results(pair=("a-model-directory-with-its-recipe-in-its-name", "the-same-after-training-and-merging")))
    assert max(map(len, lines)) <= 80
    text = [" ".join(line.split()) for line in lines]
    assert "answer loss (nats/token)" in text
    assert any(line.endswith("-2.83 ±0.40 better") for line in text)


def test_a_second_trained_system_is_compared_with_its_base_and_with_the_first() -> None:
    found = _results("other")
    figures = tuple(replace(figure, changes={}, between={"other": NONE}) for figure in found.figures)
    text = [" ".join(line.split()) for line in _lines(replace(found, figures=figures, bases={"tuned": "base", "other": "tuned"}))]
    measured = text.index("answer loss (nats/token)")
    assert text[measured + 2 : measured + 5] == [
        "tuned 4.10 ±0.45 -1.000",
        "other 3.10 ±0.45 -1.000",
        "against tuned +0.05 ±0.15 no difference",
    ]
    assert not any("against" in line for line in _lines(found))


def test_one_system_has_its_values_alone() -> None:
    both = _results()
    figures = tuple(replace(figure, changes={}) for figure in both.figures)
    text = [" ".join(line.split()) for line in _lines(Results("run", ("base",), figures, (), 1.0))]
    assert text[0] == "measured base"
    assert "answer loss (nats/token) 5.10 ±0.45" in text


def test_results_of_older_versions_are_shown_without_intervals(tmp_path: Path) -> None:
    stored = _results().as_dict()
    for key in ("headlines", "record"):
        stored.pop(key)
    for figure in stored["figures"]:
        figure.pop("intervals")
        figure.pop("changes")
    run = RunDirectory(tmp_path)
    run.evaluations.mkdir()
    (run.evaluations / "results.json").write_text(json.dumps(stored))
    found = read_results(run)
    assert found is not None
    text = "\n".join(" ".join(line.split()) for line in _lines(found))
    assert "5.100 4.100 -1.000" in text


def test_what_is_stored_is_what_is_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.evaluations.mkdir()
    (run.evaluations / "results.json").write_text(json.dumps(_results().as_dict()))
    assert read_results(run) == _results()


@pytest.mark.parametrize(
    ("number", "interval", "shown"),
    [
        (5.137, (4.7, 5.6), "5.14 ±0.45"),
        (2.6123, (2.58, 2.64), "2.612 ±0.030"),
        (0.0, (0.0, 0.142), "0.000 ≤0.142"),
        (1.0, (0.858, 1.0), "1.000 ≥0.858"),
        (1.5, None, "1.500"),
    ],
)
def test_digits_follow_the_interval(number: float, interval: tuple[float, float] | None, shown: str) -> None:
    assert value(number, interval) == shown


def test_the_sentence_tells_style_from_what_was_bound() -> None:
    figures = tuple(
        Figure("knowledge", f"{arm}: answer loss", "nats/token", 24, {"base": 5.0, "tuned": tuned}, "lower")
        for arm, tuned in {"all trained facts": 2.0, "never trained (control)": 4.5}.items()
    )
    margin = Headline("substance", "binding to its question", "nats/token", "higher", "tuned", Change(0.8, 0.3, 1.2, 0.001, "better"))
    sentence = Results("run", ("base", "tuned"), figures, (), 1.0, (), (margin,)).headline
    assert sentence is not None
    assert "-0.50 is style, -2.50 goes beyond it." in sentence
    assert "an answer gained +0.80 nats a token (95 % interval +0.30 to +1.20; better)" in sentence


@pytest.mark.parametrize(
    ("change", "interval", "shown"),
    [
        (0.00133, (0.0001, 0.0025), "+0.0013 ±0.0012"),  # not +0.001 ±0.001, which would not tell it from zero
        (-0.0048, (-0.009, -0.0004), "-0.005 ±0.004"),
        (0.5, (0.02, 1.5), "+0.50 ≥0.02"),  # reaches further up than down: half of it is more than the change
        (-0.5, (-1.5, -0.0003), "-0.5000 ≤-0.0003"),
        (-2.83, (-3.2, -2.4), "-2.83 ±0.40"),
        (0.25, None, "+0.250"),
    ],
)
def test_a_change_that_is_called_better_or_worse_is_seen_to_be_more_than_its_uncertainty(
    change: float, interval: tuple[float, float] | None, shown: str
) -> None:
    assert told_apart(change, interval) == shown
    found = _results()
    said = Change(change, *(interval or (None, None)), 0.01, "worse")
    (line,) = [
        line
        for line in _lines(replace(found, figures=tuple(replace(one, changes={"tuned": said}) for one in found.figures[:1]), headlines=()))
        if "worse" in line
    ]
    assert f"{shown} worse" in " ".join(line.split())
