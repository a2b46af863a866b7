"""The page in a real browser: its curves are drawn, it asks for nothing, and what rows say stays text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.reporting.html import write_report
from tests.reporting.browser import MISSING, Page, browser, program
from tests.reporting.conftest import CLOSING, HOSTILE, write_run

pytestmark = [pytest.mark.skipif(program() is None, reason=MISSING), pytest.mark.xdist_group("browser")]

INK = """(figure => {
  const canvas = figure.querySelector("canvas"), colour = getComputedStyle(document.documentElement).getPropertyValue("--c0").trim();
  const wanted = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let found = 0;
  for (let at = 0; at < data.length; at += 4)
    if (data[at + 3] > 200 && wanted.every((one, channel) => Math.abs(data[at + channel] - one) < 12)) found++;
  return found;
})"""
"""Pixels of a figure's canvas in the colour of the first line."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one run, and one of two."""
    folder = tmp_path_factory.mktemp("runs")
    one, other = write_run(folder / "one"), write_run(folder / "other", steps=4, rate=0.2)
    return {"one": write_report([one]), "both": write_report([one, other], folder / "both.html")}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests: to start it takes seconds."""
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(tab: Page) -> Page:
    """Its tab, with nothing noted yet."""
    tab.requests.clear()
    tab.complaints.clear()
    return tab


@pytest.mark.parametrize("which", ["one", "both"])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 390])
def test_every_chart_is_drawn_and_nothing_is_asked_for(page: Page, pages: dict[str, Path], which: str, dark: bool, width: int) -> None:
    page.show(pages[which], width, dark=dark)
    ink = page.evaluate(f"[...document.querySelectorAll('figure[data-chart]')].map({INK})")
    assert len(ink) == 6
    assert min(ink) > 150, ink
    assert page.requests == [pages[which].as_uri()]
    assert page.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == dark


def test_c10_what_rows_say_stays_text(page: Page, pages: dict[str, Path]) -> None:
    page.show(pages["one"])
    assert page.evaluate("window.owned") is None
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("document.scripts.length") == 3
    assert HOSTILE in page.evaluate("document.querySelector('#samples + dl blockquote').textContent")
    assert CLOSING in page.evaluate("document.querySelector('#chart-learning-rate .u-legend').textContent")
    assert HOSTILE in page.evaluate("document.querySelector('.finding').textContent")


def test_a_prompt_keeps_its_lines(page: Page, pages: dict[str, Path]) -> None:
    """Each role of a conversation stands on a line of its own."""
    page.show(pages["one"])
    page.evaluate("document.querySelector('dt.prompt').textContent = 'system\\nYou are one.\\nuser'")
    assert page.evaluate("document.querySelector('dt.prompt').innerText") == "system\nYou are one.\nuser"


def test_the_policy_holds_and_this_test_would_see_a_request(page: Page, pages: dict[str, Path]) -> None:
    page.show(pages["one"])
    refused = "fetch('https://example.invalid/x').then(() => 'asked', () => 'refused')"
    assert page.evaluate(refused) == "refused"
    image = "new Promise(done => { const i = new Image(); i.onerror = i.onload = () => done(1); i.src = 'https://example.invalid/y.png'; })"
    page.evaluate(image)
    page.evaluate("(s => { s.textContent = 'window.owned = 3'; document.body.append(s); })(document.createElement('script'))")
    assert page.evaluate("window.owned") is None
    assert len([text for text in page.complaints if "Content Security Policy" in text]) >= 3, page.complaints


def test_pointing_at_a_curve_reads_the_row_of_the_run(page: Page, pages: dict[str, Path]) -> None:
    page.show(pages["one"])
    page.evaluate("document.querySelector('#chart-loss').scrollIntoView({block: 'center'})")
    place = page.evaluate(
        "(r => [r.left, r.top, r.width, r.height])(document.querySelector('#chart-loss .u-over').getBoundingClientRect())"
    )
    read = "[...document.querySelectorAll('#chart-loss .u-series .u-value')].map(cell => cell.textContent)"
    # the axis spans steps 1 to 8: three sevenths of it are step 4
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0] + place[2] * 3 / 7, y=place[1] + place[3] / 2)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
    assert page.evaluate(read) == ["4", "1", "0.5"]  # the step, 4 / 4, and 2 / 4 of the evaluation
    rates = page.evaluate("[...document.querySelectorAll('#chart-learning-rate .u-series .u-value')].map(cell => cell.textContent)")
    assert rates == ["4", "0.004", "0.002"]  # the cursors of all charts go together


def test_the_axis_the_running_mean_and_the_logarithm_can_be_chosen(page: Page, pages: dict[str, Path]) -> None:
    page.show(pages["both"])
    for setting in (
        "field.value = 'tokens'",
        "field.value = 'minutes'",
        "field.value = 'epoch'",
    ):
        page.evaluate(
            f"(field => {{ {setting}; field.dispatchEvent(new Event('change', {{bubbles: true}})); }})(document.querySelector('select'))"
        )
    names = page.evaluate("[...document.querySelectorAll('#chart-loss .u-label')].map(cell => cell.textContent)")
    assert names == ["epoch", "one: training", "one: validation", "other: training", "other: validation"]
    before = page.evaluate("document.querySelector('#chart-loss canvas').toDataURL()")
    page.evaluate("document.querySelector('[name=smooth]').click()")
    smooth = page.evaluate("document.querySelector('#chart-loss canvas').toDataURL()")
    page.evaluate("document.querySelector('[name=logarithmic]').click()")
    logarithmic = page.evaluate("document.querySelector('#chart-loss canvas').toDataURL()")
    assert len({before, smooth, logarithmic}) == 3
    assert page.complaints == []


def test_the_page_follows_the_window_and_the_colours_of_the_system(page: Page, pages: dict[str, Path]) -> None:
    page.show(pages["one"])
    shape = "[document.querySelector('#chart-loss canvas').clientWidth, getComputedStyle(document.body).color]"
    wide, light = page.evaluate(shape)
    page.call("Emulation.setDeviceMetricsOverride", width=400, height=850, deviceScaleFactor=1, mobile=False)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.evaluate("new Promise(done => setTimeout(done, 300))")
    narrow, dark = page.evaluate(shape)
    assert narrow < 400 < wide
    assert light != dark
    assert page.evaluate(
        f"[...document.querySelectorAll('figure')].map({INK}).every(found => found > 100)"
    )  # redrawn in the dark's colours
    assert page.complaints == []


def test_the_numbers_of_the_page_are_those_of_metrics_jsonl(page: Page, pages: dict[str, Path]) -> None:
    page.show(pages["one"])
    rows = [json.loads(line) for line in (pages["one"].parent / "metrics.jsonl").read_text().splitlines()]
    drawn = page.evaluate("JSON.parse(document.getElementById('curves').textContent).charts[0].series[0].values")
    assert drawn == pytest.approx([row["loss"] for row in rows if row["kind"] == "step"], rel=1e-6)
