"""What preparation found in the data, on one screen of 80 columns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from finetune.cli import view
from finetune.cli.preview import visible
from finetune.cli.tables import figures_table

if TYPE_CHECKING:
    from finetune.data.fit import Fit
    from finetune.data.report import DataReport, SourceReport

_WIDEST = 100
_SOURCE_WIDTH = 30
_ADVICE_INDENT = 6


def show(report: DataReport, fit: Fit, padding: float, bars: list[tuple[int, int, int]]) -> None:
    """Sources, sides, lengths, what was changed, what to look at, and how max_tokens fits."""
    width = min(view.out.width, _WIDEST)
    for part in (
        _sources(report),
        _sides(report),
        Text.assemble(("tokens of a training example\n", "bold"), "\n".join(_histogram(bars, width))),
        _section("changed or left out", list(_changes(report)) or ["  nothing"]),
        _section("to look at", list(_findings(report, width)) or ["  no duplicates, damaged text, tiny answers or leaks into validation"]),
        _section(f"max_tokens {report.max_tokens:,}", list(_fit(fit, padding, report, width))),
    ):
        view.out.print(part, soft_wrap=isinstance(part, Text), width=None if isinstance(part, Text) else width)
        view.out.print()


def _sources(report: DataReport) -> Table:
    table = figures_table("source", "rows", "examples", "tokens", "with loss", "too long")
    for source in report.sources:
        table.add_row(
            Text(_name(source)),
            f"{source.rows:,}",
            f"{source.examples:,}",
            f"{source.tokens:,}",
            _share(source.supervised, source.tokens),
            f"{source.over_long:,}" if source.over_long else "-",
        )
    return table


def _name(source: SourceReport) -> str:
    """The end of the path, which tells sources apart, and what is special about the source."""
    path = Path(source.source)
    name = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else source.source
    name = visible(name if len(name) <= _SOURCE_WIDTH else "…" + name[1 - _SOURCE_WIDTH :])
    weight = "" if source.weight == 1 else f" x{source.weight:g}"
    return name + weight + (" (validation)" if source.side == "validation" else "")


def _sides(report: DataReport) -> Table:
    table = figures_table("an epoch", "examples", "tokens", "with loss", "shortest", "median", "p90", "p99", "longest")
    for name, side in (("training", report.train), ("validation", report.validation)):
        if side.examples:
            figures = (side.shortest, side.median, side.p90, side.p99, side.longest)
            share = _share(side.supervised, side.tokens)
            table.add_row(name, f"{side.examples:,}", f"{side.tokens:,}", share, *(f"{figure:,}" for figure in figures))
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _histogram(bars: list[tuple[int, int, int]], width: int) -> Iterator[str]:
    most = max(count for _, _, count in bars)
    digits, counted = len(f"{bars[-1][1]:,}"), len(f"{most:,}")
    room = width - 2 * digits - counted - 7
    full = "█" if view.out.encoding.lower().startswith("utf") else "#"
    for low, high, count in bars:
        # every bin that holds an example is seen
        bar = full * max(round(room * count / most), 1 if count else 0)
        yield f"  {low:>{digits},} - {high:>{digits},} {count:>{counted},} {bar}".rstrip()


def _section(title: str, lines: list[str]) -> Text:
    return Text.assemble((f"{title}\n", "bold"), "\n".join(lines))


def _changes(report: DataReport) -> Iterator[str]:
    for source in report.sources:
        done = [(word, getattr(source, word)) for word in ("dropped", "truncated", "split")]
        if source.over_long:
            told = ", ".join(f"{count:,} {word}" for word, count in done if count)
            yield f"  {source.over_long:,} of {source.rows:,} rows longer than max_tokens in {_name(source)}: {told}"
    for reason, count in report.dropped.items():
        yield f"  {count:,} left out: {reason}"


def _findings(report: DataReport, width: int) -> Iterator[str]:
    for source in report.sources:
        if source.unused:
            told = ", ".join(f"{visible(name)} ({count:,} row{'s' * (count > 1)})" for name, count in source.unused.items())
            yield "  " + view.wrapped(f"columns not used in {_name(source)}: {told}", _ADVICE_INDENT, width)
    for finding in report.findings:
        yield f"  {finding.count:,} {finding.name}"
        for place in finding.places:
            yield f"      {visible(place).replace(f'{Path.cwd()}/', '')}"
        if finding.advice:
            yield " " * _ADVICE_INDENT + view.wrapped(finding.advice, _ADVICE_INDENT, width)


def _fit(fit: Fit, padding: float, report: DataReport, width: int) -> Iterator[str]:
    yield "  training examples above " + ", ".join(f"{part}: {share:.1%}" for part, share in fit.above.items() if part != "100%")
    yield f"  training examples that fill it: {fit.above['100%']:.1%}; rows that did not fit: {fit.over_long:.1%}"
    yield "  " + view.wrapped(_longest(fit, report), _ADVICE_INDENT, width)
    yield f"  padding: {padding:.1%} of the positions, where micro-batches are padded (train.kernels)"


def _longest(fit: Fit, report: DataReport) -> str:
    """The longest conversation and what would hold it; plain text has no length to hold, since it is cut into blocks."""
    blocks = "plain text is cut into blocks of max_tokens anyway"
    if not any(source.longest_row for source in report.sources):
        return f"the longest block has {fit.longest:,} tokens; {blocks}"
    advice = "" if fit.fits else f": `max_tokens: {fit.suggested}` would hold every conversation"
    text = f"; {blocks}, the longest block has {report.train.longest:,}" if report.train.longest > fit.longest else ""
    return f"the longest conversation has {fit.longest:,} tokens{advice}{text}"


def as_json(report: DataReport, fit: Fit, padding: float, fingerprint: str) -> dict[str, Any]:
    """The same for programs."""
    fitted, reported = fit.as_dict(), report.as_dict()
    return {
        "fingerprint": fingerprint,
        "counts": _snake_case(report.counts),
        "fit": fitted | {"above": _snake_case(fitted["above"]), "padding": padding},
        **reported,
        "dropped": _snake_case(reported["dropped"]),
    }


def _snake_case(named: dict[str, Any]) -> dict[str, Any]:
    """``named`` with keys such as `dropped_near_duplicate` for `dropped: near duplicate`, and `50_percent` for `50%`."""
    return {re.sub(r"\W+", "_", name.replace("%", " percent")).strip("_"): value for name, value in named.items()}
