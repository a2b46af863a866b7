"""The images are XML that parses, whatever the names are, and hold what was measured."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from finetune.analysis.plot import GridPanel, Line, LinePanel, Mark, Plane, _round_numbers, plane_svg, svg, write_plot
from finetune.errors import ConfigError

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<script>alert("1")</script>&amp; \x07\x00 ]]> " onload="x'


def elements(image: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(image).iter(SVG + tag))


def test_hostile_names_are_text() -> None:
    panels = [
        LinePanel(HOSTILE, (Line(HOSTILE, ((0.0, 1.0), (1.0, 2.0))), Line(HOSTILE, ((0.0, 1.0),)))),
        GridPanel(HOSTILE, (HOSTILE,), ((0.5,),)),
    ]
    image = svg(HOSTILE, [HOSTILE], panels)
    assert not elements(image, "script")
    assert any("<script>" in (element.text or "") for element in elements(image, "text"))
    assert not re.search(r"[\x00-\x08]", image)


def test_points_lie_in_their_panel_and_keep_their_order() -> None:
    image = svg("t", [], [LinePanel("p", (Line("a", tuple((float(x), float(x * x)) for x in range(5))),))])
    points = [tuple(map(float, point.split(","))) for point in elements(image, "polyline")[0].attrib["points"].split()]
    assert len(points) == len(elements(image, "circle")) == 5
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)  # up is less in SVG
    assert all(0 <= x <= 320 and 0 <= y <= 200 for x, y in points)


def test_a_logarithmic_panel_leaves_out_what_has_no_logarithm() -> None:
    line = Line("a", ((0.0, 0.1), (1.0, math.inf), (2.0, 0.0), (3.0, 10.0)))
    image = svg("t", [], [LinePanel("p", (line,), logarithmic=True)])
    assert len(elements(image, "circle")) == 2
    texts = [element.text for element in elements(image, "text")]
    assert "10" in texts
    assert "0.1" in texts


@pytest.mark.parametrize("points", [(), ((0.0, math.inf),), ((0.0, 0.0),), ((3.0, 2.0), (4.0, 2.0))])
def test_panels_with_nothing_or_one_value_are_drawn(points: tuple[tuple[float, float], ...]) -> None:
    for logarithmic in (False, True):
        ElementTree.fromstring(svg("t", ["note"], [LinePanel("p", (Line("a", points),), logarithmic)]))


def test_several_lines_are_named_once_for_all_panels() -> None:
    panel = LinePanel("p", (Line("one", ((0.0, 1.0),)), Line("two", ((0.0, 2.0),))))
    names = [element.text or "" for element in elements(svg("t", [], [panel, panel]), "tspan")]
    assert [name[2:] for name in names] == ["one", "two"]


def test_a_grid_shows_every_value() -> None:
    image = svg("t", [], [GridPanel("g", ("1", "4"), ((0.1, 0.2), (0.3, 1.0)))])
    texts = [element.text for element in elements(image, "text")]
    assert {"0.10", "0.20", "0.30", "1.00"} <= set(texts)
    assert len(elements(image, "rect")) == 5  # four cells on the ground


def test_a_page_holds_the_image_and_loads_nothing(tmp_path: Path) -> None:
    write_plot(tmp_path / "p.html", "a & b", ["n"], [GridPanel("g", ("1",), ((1.0,),))])
    page = (tmp_path / "p.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<svg" in page
    assert not re.search(r"<script|<link|src=|href=", page)


@pytest.mark.parametrize(("name", "what"), [("p.png", r"\.svg or \.html"), ("plot", "without suffix"), ("none/p.svg", "does not exist")])
def test_paths_that_cannot_be_plots_are_refused(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        write_plot(tmp_path / name, "t", [], [])
    assert not list(tmp_path.iterdir())


def test_a_plane_has_its_marks_within_their_bars_and_text_stays_text() -> None:
    marks = (Mark(1.0, 0.2, (0.5, 1.5), (0.1, 0.3)), Mark(2.0, 0.4, (1.8, 2.2), (0.1, 0.7)))
    names = [HOSTILE, *(f"arm {number}" for number in range(10))]  # more than there are colours
    image = plane_svg(HOSTILE, [HOSTILE], Plane(HOSTILE, HOSTILE, tuple((name, marks) for name in names)))
    assert not elements(image, "script")
    discs, first = elements(image, "circle"), elements(image, "path")[1].attrib["d"]
    x, y = (float(discs[0].attrib[key]) for key in ("cx", "cy"))
    left, right = map(float, re.findall(r"M([\d.]+),[\d.]+ H([\d.]+)", first)[0])
    bottom, top = map(float, re.findall(r"M[\d.]+,([\d.]+) V([\d.]+)", first)[0])
    assert 0 <= left < x < right <= 640
    assert 0 <= top < y < bottom <= 420  # up is less in SVG
    assert x == pytest.approx((left + right) / 2, abs=0.1)
    assert float(discs[1].attrib["cx"]) > x
    assert len(elements(image, "rect")) == 2 + 3 * 3  # ground, frame, and three series that are squares
    with pytest.raises(ValueError, match="without marks"):
        plane_svg("t", [], Plane("a", "b", (("empty", ()),)))


@pytest.mark.parametrize(
    ("span", "numbers"),
    [
        ((-0.76, 1.49), [-0.5, 0.0, 0.5, 1.0]),
        ((-0.06, 0.75), [0.0, 0.2, 0.4, 0.6]),
        ((0.0, 1000.0), [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]),
        ((-3e-5, 5e-5), [-3e-5, -2e-5, -1e-5, 0.0, 1e-5, 2e-5, 3e-5, 4e-5, 5e-5]),
    ],
)
def test_axes_have_round_numbers(span: tuple[float, float], numbers: list[float]) -> None:
    assert _round_numbers(span) == pytest.approx(numbers)
