"""What a user sees: tables, progress, errors. Results go to stdout; everything else to stderr."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from finetune.cli.results_table import CAPTION, results_table
from finetune.errors import DataError, FinetuneError, Problem, RunInterruptedError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)

_FIRST_PLACES = 3
_OPTION = r"(?:-o \S+|--devices \d+)"
_OPTIONS = re.compile(rf"{_OPTION}(?: {_OPTION})*")
_LABEL = re.compile(r"(note: )?\s*")
_HELD = "\x1f"
"""Stands for a space at which no line ends, while text is wrapped."""


def show_error(error: FinetuneError) -> None:
    """Every problem of ``error`` in its parts; what is wrong in several places alike is said once."""
    label = "interrupted: " if isinstance(error, RunInterruptedError) else "error: "
    for same in _alike(error.problems):
        problem = same[0]
        err.print(Text(label, style="bold red") + Text(hanging(problem.what, len(label)), style="bold"), soft_wrap=True)
        if places := _places([one.where for one in same if one.where], "rows" if isinstance(error, DataError) else "places"):
            # broken between places only, so that each path can be copied
            err.print(Text("  where: " + (hanging(places, len("  where: ")) if len(same) > 1 else places)), soft_wrap=True)
        for line in problem.excerpt.splitlines():
            err.print(Text(f"    {line}", style="dim"), soft_wrap=True)
        if problem.fix:
            err.print(Text("  fix:   " + hanging(problem.fix, len("  fix:   "))), soft_wrap=True)


def _alike(problems: Sequence[Problem]) -> list[list[Problem]]:
    """``problems`` by what is wrong and how to mend it, in the order in which each comes first."""
    found: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        found.setdefault((problem.what, problem.fix), []).append(problem)
    return list(found.values())


def _places(places: Sequence[str], unit: str) -> str:
    """All of ``places``, or how many they are and the first of them."""
    if len(places) < 2:
        return "".join(places)
    first = ", ".join(places[:_FIRST_PLACES])
    return f"{len(places)} {unit}, first {first}" if len(places) > _FIRST_PLACES else f"{len(places)} {unit}, {first}"


def hanging(text: str, indent: int) -> str:
    """``text`` wrapped to the terminal with its further lines indented; as it is in a pipe."""
    if not err.is_terminal:
        return text
    return wrapped(text, indent, err.width)


def wrapped(text: str, indent: int, width: int) -> str:
    """``text`` within ``width`` columns, its further lines indented as the first is to be.

    Options that follow each other stay on one line, so that they can be copied, even where that is longer.
    """
    room = max(40, width - indent)
    whole = _OPTIONS.sub(lambda found: found[0].replace(" ", _HELD), text)
    lines = textwrap.fill(whole, room, break_on_hyphens=False, break_long_words=False)
    return lines.replace(_HELD, " ").replace("\n", "\n" + " " * indent)


def has_colour() -> bool:
    """Whether results are shown in colour; NO_COLOR takes it away from a terminal too."""
    return out.is_terminal and not out.no_color


def show_example(heading: str, text: Text, ids: Sequence[int], *, last: bool) -> None:
    """One example of the data under a line that says what it is; then its token ids, if any are given."""
    out.print(Text(heading, style="bold"))
    text.rstrip()
    out.print(text)
    if ids:
        out.print(Text(", ".join(map(str, ids)), style="dim"))
    if not last:
        out.print()


def note(text: str) -> None:
    """A sentence for people, which stays one line in a pipe; in a terminal its further lines are indented."""
    label = _LABEL.match(text)
    assert label is not None
    rest = text[label.end() :]
    err.print(Text(label[0] + hanging(rest, label.end() if label[1] else label.end() + 2)), soft_wrap=True)


def path(text: str) -> None:
    """One line that holds a path: never broken, so that the path can be copied."""
    err.print(Text(text), soft_wrap=True)


class Preparation:
    """A bar while data is prepared, one stage after the other: in a terminal only, and not where the cache has it all."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[share]}"),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            expand=True,
        )
        self._stage = ""
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, of: int) -> None:
        """``done`` of ``of`` units of a stage are finished; 0 where their number is not known."""
        if not err.is_terminal:
            return
        if self._task is None or stage != self._stage:
            self.clear()
            self._stage, self._task = stage, self._progress.add_task(f"preparing data: {stage}", total=None, share="")
            self._progress.start()
        self._progress.update(self._task, completed=done, total=of or None, share=f"{done / of:.0%}" if of else "")

    def clear(self) -> None:
        """Take the bar off the screen."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.stop()
            self._task = None


@contextmanager
def preparing() -> Iterator[Preparation]:
    """A bar for the preparation of data, which an error does not leave behind."""
    bar = Preparation()
    try:
        yield bar
    finally:
        bar.clear()


@contextmanager
def counting(title: str) -> Iterator[Any]:
    """A progress line for work whose length is not known; yields (what, done) -> None."""
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, count: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(f"{title}: {what}", total=None)
            progress.advance(tasks[what], count)

        yield advance


def show_results(results: Any) -> None:
    """The table, what it means, then the questions."""
    out.print(results_table(results))
    if any(figure.intervals for figure in results.figures):
        out.print(Text(CAPTION, style="dim"), soft_wrap=not out.is_terminal)
    for note in results.notes:
        out.print(Text(wrapped(note, 2, out.width) if out.is_terminal else note, style="dim"), soft_wrap=True)
    if sentence := results.headline:
        out.print()
        out.print(sentence)
    show_samples(results.samples)


def show_places(places: Mapping[str, Any]) -> None:
    """Where things lie."""
    out.print()
    width = max(map(len, places))
    for name, path in places.items():
        out.print(Text(f"{name:<{width}}  {path}"))


def show_samples(samples: Any) -> None:
    """Questions with the answers of every system."""
    for sample in samples:
        out.print()
        out.print(Text(sample.question, style="bold"))
        out.print(Text(f"  ({sample.kind})", style="dim"))
        lines: Mapping[str, str] = {"expected": sample.expected, **sample.answers}
        width = max(map(len, lines))
        for name, text in lines.items():
            out.print(Text(f"  {name:<{width}}  {' '.join(text.split())}"))
