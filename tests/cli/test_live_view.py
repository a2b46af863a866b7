"""The live view: what it says at 80 and 200 columns and without colour, that it keeps its place, and that it leaves the terminal clean."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.console import Console
from rich.text import Text

from finetune.cli import view
from finetune.cli.live.figures import Figures
from finetune.cli.live.panel import Look, duration, panel, rate_texts
from finetune.cli.live.pinned import Pinned, held, is_live
from finetune.cli.live.sparkline import Trace, sparkline
from finetune.cli.training_view import TrainingView
from finetune.config.load import load_config
from finetune.config.tracking import Tracking
from finetune.planning.steps import Steps
from finetune.training.metrics import KINDS, Evaluated, Sample, Sampled, Started, StepDone, TrackerLost

RATES = {"attention": 5e-5, "mlp": 1e-4, "(rest)": 1e-4, "embeddings": 1e-5}
ASKED = {"prompt": "What is E10.9?\nassistant", "text": "Type 1 \x1b[31mdiabetes\nmellitus"}
AT_80 = """\
step 120/400  30%  9:20 left, 4:00 gone  epoch 0.60 of 2
━━━━━━━━━━━━━━━━━━━━━━━━────────────────────────────────────────────────────────
loss        1.2123    ████▇▇▆▆▅▅▅▅▄▄▄▄▃▃▃▃▃▃▂▂▂▂▂▂▂▂▂▂▂▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁
validation  1.3498  best 1.3498 at step 120  █▄▂▁
gradient    0.6  13% clipped at 1  ███▆▅▄▃▃▂▂▂▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁
rate        attention 5.00e-05, mlp + (rest) 1.00e-04, embeddings 1.00e-05
speed       1,078 tok/s (72% of the 1,500 planned), reading rows 1%
memory      3.00 GiB at most of 32.00 GiB (9%)
sample 120  What is E10.9? assistant
            -> Type 1 \\x1b[31mdiabetes mellitus"""


def after_120_steps() -> Figures:
    now = [0.0]
    figures = Figures(lambda: now[0])
    figures.max_norm = 1.0
    figures.start(400, 0, 32 * 2**30)
    for step in range(1, 121):
        now[0] += 2.0
        figures.stepped(
            {
                "step": step,
                "epoch": step / 200,
                "loss": 1.2 + 1.5 * math.exp(-step / 25),
                "grad_norm": 0.6 + 2 * math.exp(-step / 10),
                "learning_rates": RATES,
                "tokens": 2048,
                "seconds": 1.9,
                "input_seconds": 0.02,
                "memory_bytes": 3 * 2**30,
            }
        )
        if step % 30 == 0:
            figures.evaluated(step, 1.3 + math.exp(-step / 40))
    figures.sampled(120, [ASKED])
    return figures


def lines(width: int, height: int, *, blocks: bool = True) -> list[str]:
    return [line.plain for line in panel(after_120_steps(), Look(2, blocks, 1500.0), width, height)]


def without_curves(shown: list[str]) -> list[str]:
    return [re.sub(r"[▁-█━─]+", "", line).rstrip() for line in shown]


# --- what it says --------------------------------------------------------------------------------------------------------------------


def test_the_panel_at_80_columns() -> None:
    assert "\n".join(line.rstrip() for line in lines(80, 24)) == AT_80


def test_the_panel_at_200_columns_has_longer_curves_and_the_same_words() -> None:
    wide = lines(200, 50)
    assert without_curves(wide) == without_curves(AT_80.split("\n"))
    assert len(wide[1]) == 200
    assert len(re.findall("[▁-█]", wide[2])) == 100


def test_without_block_characters_it_is_ascii() -> None:
    text = "\n".join(lines(80, 24, blocks=False))
    assert text.isascii()
    assert "####" in text


@pytest.mark.parametrize("width", [20, 40, 79, 120])
@pytest.mark.parametrize("height", [1, 3, 7, 40])
def test_it_fits_any_terminal(width: int, height: int) -> None:
    shown = lines(width, height)
    assert len(shown) <= height
    assert all(len(line) <= width for line in shown)
    assert shown[0].startswith("step 120/400")


def test_a_low_terminal_keeps_what_matters_most() -> None:
    assert [line.split()[0] for line in lines(80, 5)] == ["step", "loss", "validation", "speed", "memory"]


def test_nothing_is_invented_before_the_first_step() -> None:
    figures = Figures(lambda: 0.0)
    figures.start(10, 0, 0)
    text = "\n".join(line.plain for line in panel(figures, Look(1), 80, 24))
    assert "left" not in text
    assert "planned" not in text
    assert "validation  not measured yet" in text
    assert re.search(r"^loss +- *$", text, re.M)


def test_figures_of_a_resumed_run_go_on_from_its_rows_of_any_version() -> None:
    rows = [{"kind": "step", "step": step, "epoch": 0.1, "loss": 3.0, "grad_norm": 2.0, "learning_rates": {"all": 0.1}} for step in (1, 2)]
    figures = Figures(lambda: 0.0)
    later = [{"kind": "evaluation", "step": 2, "validation_loss": 2.5}, {"kind": "sample", "step": 2, "samples": [ASKED]}]
    figures.start(10, 2, 0, [*rows, *later])
    assert (figures.loss, figures.best, figures.step) == (3.0, (2.5, 2), 2)
    assert figures.losses.points(9) == [3.0, 3.0]
    assert figures.speed is None


def test_a_trace_of_any_length_stays_small_and_keeps_its_mean() -> None:
    trace = Trace()
    for value in range(100_000):
        trace.add(float(value))
    points = trace.points(50)
    assert len(points) == 50
    assert points == sorted(points)
    assert sum(points) / 50 == pytest.approx(49_999.5, rel=0.01)


def test_a_sparkline_is_not_flattened_by_one_large_value() -> None:
    assert sparkline([1.0] * 20 + [3.0] * 19 + [1e9]).count("▁") == 20
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""


@pytest.mark.parametrize(("seconds", "said"), [(0, "0:00"), (75, "1:15"), (3700, "1:01:40"), (100_000, "1 d 3:46:40")])
def test_durations_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_groups_of_one_rate_share_a_word() -> None:
    assert rate_texts({"a": 1e-4, "b": 1e-4}) == ["1.00e-04"]
    assert rate_texts({"a": 1e-4, "b\x1b[2J": 2e-4}) == ["a 1.00e-04", "b\\x1b[2J 2.00e-04"]


# --- where it stands -----------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that pyte reads as a terminal would."""

    def __init__(self, columns: int = 60, rows: int = 12) -> None:
        super().__init__()
        self.screen = pyte.Screen(columns, rows)
        self._reader = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self._reader.feed(text.replace("\n", "\r\n"))
        return super().write(text)

    def isatty(self) -> bool:
        return True

    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]


def pinned(terminal: Terminal) -> tuple[Console, Pinned, list[str]]:
    console = Console(file=terminal, force_terminal=True, width=terminal.screen.columns, height=terminal.screen.lines, color_system=None)
    says = ["first", "second"]
    return console, Pinned(console, lambda width, height: [Text(line.ljust(width)[:width]) for line in says][:height]), says


def test_what_is_printed_stands_above_and_the_panel_is_drawn_once() -> None:
    terminal = Terminal()
    _, shown, says = pinned(terminal)
    shown.start()
    shown.print(Text("one"))
    says[1] = "third"
    shown.refresh()
    shown.print(Text("two"))
    shown.stop()
    assert terminal.shown() == ["one", "two", "first", "third"]
    assert (terminal.screen.cursor.x, terminal.screen.cursor.y) == (0, 4)


def test_it_switches_nothing_that_a_killed_process_would_leave_behind() -> None:
    terminal = Terminal()
    _, shown, _ = pinned(terminal)
    shown.start()
    shown.print(Text("one"))
    shown.stop()
    assert set(re.findall(r"\x1b\[[?\d;]*[A-Za-z]", terminal.getvalue())) <= {"\x1b[2K", "\x1b[J", "\x1b[2A"}


def test_a_screen_that_scrolls_keeps_one_panel() -> None:
    terminal = Terminal(rows=6)
    _, shown, _ = pinned(terminal)
    shown.start()
    for number in range(20):
        shown.print(Text(f"line {number}"))
    shown.stop()
    assert terminal.shown() == ["line 17", "line 18", "line 19", "first", "second"]


def test_a_narrower_terminal_is_drawn_from_where_its_broken_lines_begin() -> None:
    terminal = Terminal()
    console, shown, _ = pinned(terminal)
    shown.start()
    console.width = 25  # two lines of 60 columns are now three rows each
    before = len(terminal.getvalue())
    shown.refresh()
    shown.stop()
    assert terminal.getvalue()[before:].startswith("\x1b[6A\r")
    assert all(len(line) <= 25 for line in re.split(r"\n", re.sub(r"\x1b\[\w+|\r", "", terminal.getvalue()[before:])))


def test_what_libraries_write_comes_above_as_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    _, shown, _ = pinned(terminal)
    shown.start()
    sys.stderr.write("a warn")
    sys.stderr.write("ing\n")
    sys.stderr.write("10%\r20%\r100%\nno end")
    shown.stop()
    assert sys.stderr is terminal
    assert terminal.shown() == ["a warning", "100%", "no end", "first", "second"]


def test_a_closed_terminal_ends_the_drawing_and_not_the_run() -> None:
    class Closed(Terminal):
        def write(self, text: str) -> int:
            if text:
                raise OSError(5, "Input/output error")
            return 0

    _, shown, _ = pinned(Closed())
    shown.start()
    shown.print(Text("one"))
    shown.stop()


def test_other_workers_keep_their_lines_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with held("worker 1"):
        for _ in range(3):
            print("the same warning", file=sys.stderr)
        assert terminal.shown() == []
    assert terminal.shown() == ["worker 1: the same warning"]


# --- a run, event by event -----------------------------------------------------------------------------------------------------------


def follow(config: Path, console: Console, monkeypatch: pytest.MonkeyPatch, *, done: int = 0, steps: int = 40) -> None:
    monkeypatch.setattr(view, "err", console)
    watching = TrainingView(load_config(config).config)
    group = {"name": "(rest)", "tensors": 3, "parameters": 300, "learning_rate": 1e-3, "weight_decay": 0.0}
    with watching.running():
        counts = {"training rows": 72, "training tokens": 1000}
        watching(Started(Steps(steps, steps, 0), done, 2, 100, (group,), counts, {}, (), "1 x cpu", 2**34))
        for step in range(done + 1, steps + 1):
            watching(StepDone(step, step / steps, 2.0, 0.5, {"(rest)": 1e-3}, 100, 60, 0.5, 0.01, 2**30))
        watching(Evaluated(steps, 1.5, 0.1, best=True))
        watching(Sampled(steps, (Sample(**ASKED),), 0.1))
        watching(TrackerLost("wandb", "no route"))


def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


SETTINGS = {"CI": {"CI": "true"}, "NO_COLOR": {"NO_COLOR": "1"}, "dumb": {"TERM": "dumb"}}


@pytest.mark.parametrize("plain", ["pipe", "CI", "NO_COLOR", "dumb"])
def test_plain_lines_where_nothing_may_be_redrawn(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, plain: str) -> None:
    lasting(monkeypatch)
    for name, value in SETTINGS.get(plain, {}).items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=plain != "pipe", color_system=None)
    assert not is_live(console)
    follow(write_config(), console, monkeypatch)
    text = stream.getvalue()
    assert "\x1b[2K" not in text
    assert "\r" not in text
    assert len(re.findall(r"^step \d+/40  loss 2\.0000  grad norm 0\.500  lr 1\.00e-03  200 tok/s  1\.00 GiB", text, re.M)) == 21
    assert "step 40: validation loss 1.5000 (best)" in text
    assert r"step 40: sample: What is E10.9? assistant -> Type 1 \x1b[31mdiabetes mellitus" in text
    assert "wandb takes no more figures (no route)" in text


def test_a_terminal_gets_the_panel_once(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    lasting(monkeypatch)
    terminal = Terminal(80, 40)
    console = Console(file=terminal, width=80, height=40, force_terminal=True)
    assert is_live(console)
    follow(write_config(), console, monkeypatch)
    text = "\n".join(terminal.shown())
    assert text.count("step 40/40  100%") == 1
    assert text.index("validation loss 1.5000 (best)") < text.index("step 40/40")
    assert re.search(r"^memory +1\.00 GiB at most of 16\.00 GiB \(6%\)$", text, re.M)
    assert "Resuming" not in text


def test_each_sample_has_its_turn_whatever_the_steps_are_multiples_of() -> None:
    figures = Figures(lambda: 0.0)
    figures.start(400, 0, 0)
    found = [{"prompt": name, "text": "x"} for name in ("a", "b")]
    shown = []
    for step in (100, 200, 300):
        figures.sampled(step, found)
        assert figures.sample is not None
        shown.append(figures.sample[:2])
    assert shown == [(100, "a"), (200, "b"), (300, "a")]


def test_a_resumed_run_says_from_where(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    follow(write_config(), Console(file=stream, width=80), monkeypatch, done=30)
    assert "Resuming from step 30 of 40." in stream.getvalue()


def test_an_error_leaves_the_streams_as_they_were(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    lasting(monkeypatch)
    before: tuple[Any, Any] = (sys.stdout, sys.stderr)
    terminal = Terminal(80, 40)
    monkeypatch.setattr(TrainingView, "_on_evaluated", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        follow(write_config(), Console(file=terminal, width=80, height=40, force_terminal=True), monkeypatch)
    assert (sys.stdout, sys.stderr) == before


def test_the_page_names_every_key_of_a_row_and_every_tracker() -> None:
    page = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()
    for row, kind in KINDS.items():
        line = next(line for line in reversed(page.splitlines()) if line.startswith(f"| `{kind}` |"))
        assert {field.name for field in fields(row)} <= set(re.findall(r"`(\w+)`", line)), kind
    services = set(Tracking.model_fields) - {"project"}
    assert {(name, name) for name in services} == set(re.findall(r"^\| `tracking\.(\w+)` \| `(\w+)` \|", page, re.M))
