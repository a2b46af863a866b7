"""Plots as SVG written by hand: a grid of panels that opens in a browser, loads nothing and holds no script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import ConfigError
from finetune.sealed import write_text

_WIDTH, _HEIGHT, _COLUMNS, _MARGIN = 320, 200, 3, 16
_LEFT, _TOP, _BOTTOM = 60, 30, 30
_COLOURS = ("#1f6feb", "#d1571b", "#1a7f37", "#8250df", "#bf3989", "#7d6608", "#0a7d91", "#57606a")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a panel."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(layer, value)"""


@dataclass(frozen=True, slots=True)
class LinePanel:
    """Values over the layers of a model."""

    title: str
    lines: tuple[Line, ...]
    logarithmic: bool = False


@dataclass(frozen=True, slots=True)
class GridPanel:
    """Values between 0 and 1 over a square grid."""

    title: str
    labels: tuple[str, ...]
    """Of rows, and of columns too."""
    values: tuple[tuple[float, ...], ...]


Panel = LinePanel | GridPanel


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a plane with its two intervals."""

    x: float
    y: float
    across: tuple[float, float]
    up: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Plane:
    """Named series of marks over two quantities, each joined in its order."""

    across: str
    """What is drawn from left to right, with its unit."""
    up: str
    series: tuple[tuple[str, tuple[Mark, ...]], ...]
    """(name, marks)"""


def check_plot_path(path: Path) -> None:
    """ConfigError where ``path`` is no file that `write_plot` could write."""
    if path.suffix.lower() not in (".svg", ".html"):
        raise ConfigError(f"a plot is an .svg or .html file, not {path.suffix or 'a file without suffix'}", where=f"--plot {path}")
    if not path.absolute().parent.is_dir():
        raise ConfigError("the directory of the plot does not exist", where=f"--plot {path}", fix=f"mkdir -p {path.parent}")


def write_plot(path: Path, title: str, notes: Sequence[str], panels: Sequence[Panel]) -> None:
    """Write ``panels`` as an SVG image, or as a page that holds it where ``path`` ends in .html. HardwareError: the disk refuses."""
    check_plot_path(path)
    image = svg(title, notes, panels)
    if path.suffix.lower() == ".svg":
        write_text(path, image)
        return
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"></head><body style="margin:0">\n{image}</body></html>\n',
    )


def svg(title: str, notes: Sequence[str], panels: Sequence[Panel]) -> str:
    """One image with ``title``, ``notes`` below it and ``panels`` in rows of three; all text is escaped."""
    legend = _legend(panels, 48 + 16 * len(notes))
    top = 48 + 16 * (len(notes) + bool(legend))
    rows = max(1, math.ceil(len(panels) / _COLUMNS))
    width, height = 2 * _MARGIN + _COLUMNS * _WIDTH, top + rows * _HEIGHT + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="system-ui, sans-serif" '
        f'font-size="11" fill="#1f2328"><title>{_text(title)}</title><rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="28" font-size="16" font-weight="600">{_text(title)}</text>',
        *(f'<text x="{_MARGIN}" y="{48 + 16 * number}">{_text(note)}</text>' for number, note in enumerate(notes)),
        legend,
    ]
    for number, panel in enumerate(panels):
        x, y = _MARGIN + number % _COLUMNS * _WIDTH, top + number // _COLUMNS * _HEIGHT
        drawn = _lines(panel) if isinstance(panel, LinePanel) else _grid(panel)
        parts.append(f'<g transform="translate({x},{y})"><text x="4" y="18" font-weight="600">{_text(panel.title)}</text>{drawn}</g>')
    return "\n".join((*parts, "</svg>\n"))


_PLANE = (640, 420)


def plane_svg(title: str, notes: Sequence[str], plane: Plane) -> str:
    """One image of a plane with error bars, the names of its series beside it; all text is escaped. ValueError without a mark."""
    marks = [mark for _, series in plane.series for mark in series]
    if not marks:
        raise ValueError("a plane without marks")
    lows_x, highs_x = zip(*(mark.across for mark in marks), strict=True)
    lows_y, highs_y = zip(*(mark.up for mark in marks), strict=True)
    spans = (_span(0.0, *lows_x, *highs_x), _span(0.0, *lows_y, *highs_y))
    top, (wide, high) = 56 + 16 * len(notes), _PLANE
    width, height = _LEFT + wide + 180, top + high + 60
    named = (
        f'<g fill="{_COLOURS[n % len(_COLOURS)]}">{_shape(n, wide + 24, 12 + 18 * n)}'
        f'<text x="{wide + 34}" y="{16 + 18 * n}">{_text(name)}</text></g>'
        for n, (name, _) in enumerate(plane.series)
    )
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="system-ui, sans-serif" '
            f'font-size="11" fill="#1f2328"><title>{_text(title)}</title><rect width="{width}" height="{height}" fill="#ffffff"/>',
            f'<text x="{_MARGIN}" y="28" font-size="16" font-weight="600">{_text(title)}</text>',
            *(f'<text x="{_MARGIN}" y="{48 + 16 * number}">{_text(note)}</text>' for number, note in enumerate(notes)),
            f'<g transform="translate({_LEFT},{top})">{_plane_axes(plane, spans)}',
            *(_series(number, marks, spans) for number, (_, marks) in enumerate(plane.series)),
            *named,
            "</g></svg>\n",
        )
    )


_Span = tuple[float, float]


def _span(*values: float) -> _Span:
    low, high = min(values), max(values)
    room = (high - low or 1.0) * 0.04
    return low - room, high + room


def _on_plane(x: float, y: float, spans: tuple[_Span, _Span]) -> tuple[float, float]:
    (left, right), (bottom, top) = spans
    return (x - left) / (right - left) * _PLANE[0], (top - y) / (top - bottom) * _PLANE[1]


def _plane_axes(plane: Plane, spans: tuple[_Span, _Span]) -> str:
    """The frame, lines at zero, and round numbers along each side."""
    wide, high = _PLANE
    zero_x, zero_y = _on_plane(0.0, 0.0, spans)
    parts = [
        f'<rect width="{wide}" height="{high}" fill="none" stroke="#d0d7de"/>'
        f'<path d="M{zero_x:.1f},0 V{high} M0,{zero_y:.1f} H{wide}" stroke="#d0d7de" stroke-dasharray="4 3"/>'
    ]
    for x in _round_numbers(spans[0]):
        across, _ = _on_plane(x, 0.0, spans)
        parts.append(f'<text x="{across:.1f}" y="{high + 16}" text-anchor="middle" fill="#57606a">{x:.6g}</text>')
    for y in _round_numbers(spans[1]):
        _, up = _on_plane(0.0, y, spans)
        parts.append(f'<text x="-6" y="{up + 4:.1f}" text-anchor="end" fill="#57606a">{y:.6g}</text>')
    parts.append(
        f'<text x="{wide / 2}" y="{high + 38}" text-anchor="middle">{_text(plane.across)}</text>'
        f'<text transform="translate(-44,{high / 2}) rotate(-90)" text-anchor="middle">{_text(plane.up)}</text>'
    )
    return "".join(parts)


def _round_numbers(span: _Span) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten in ``span``: at most nine."""
    low, high = span
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 8)
    return [round(place * step, 12) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _series(number: int, marks: Sequence[Mark], spans: tuple[_Span, _Span]) -> str:
    colour = _COLOURS[number % len(_COLOURS)]
    placed = [_on_plane(mark.x, mark.y, spans) for mark in marks]
    bars = []
    for mark, (x, y) in zip(marks, placed, strict=True):
        (left, _), (right, _) = (_on_plane(end, mark.y, spans) for end in mark.across)
        (_, bottom), (_, top) = (_on_plane(mark.x, end, spans) for end in mark.up)
        bars.append(f"M{left:.1f},{y:.1f} H{right:.1f} M{x:.1f},{bottom:.1f} V{top:.1f}")
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    return (
        f'<g fill="{colour}" stroke="{colour}"><path d="{" ".join(bars)}" stroke-opacity="0.35"/>'
        f'<polyline points="{joined}" fill="none" stroke-dasharray="2 3"/>{"".join(_shape(number, x, y) for x, y in placed)}</g>'
    )


def _shape(number: int, x: float, y: float) -> str:
    """A disc for the first series, and a square where the colours begin again."""
    if number < len(_COLOURS):
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'


def _legend(panels: Sequence[Panel], y: float) -> str:
    """The names of the lines, once for all panels: in each of them the same ones have the same colours. Empty for one line."""
    lines = next((panel.lines for panel in panels if isinstance(panel, LinePanel)), ())
    if len(lines) < 2:
        return ""
    names = (
        f'<tspan fill="{_COLOURS[number % len(_COLOURS)]}" dx="{12 if number else 0}">\u25cf {_text(line.name)}</tspan>'
        for number, line in enumerate(lines)
    )
    return f'<text x="{_MARGIN}" y="{y}">{"".join(names)}</text>'


def _text(value: str) -> str:
    """``value`` for XML, which has no place for control characters, escaped or not."""
    return html.escape("".join(char if char.isprintable() else "\ufffd" for char in value))


def _lines(panel: LinePanel) -> str:
    points = [point for line in panel.lines for point in line.points if _drawable(point[1], panel.logarithmic)]
    if not points:
        return f'<text x="{_LEFT}" y="{_TOP + 40}" fill="#57606a">nothing to draw</text>'
    ys = [_scaled(y, panel.logarithmic) for _, y in points]
    low, high = (min(ys), max(ys)) if panel.logarithmic else (min(0.0, *ys), max(ys))
    high = high if high > low else low + 1.0
    last = max(1.0, *(x for x, _ in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / last * (_WIDTH - _LEFT - 24)
        return across, _TOP + (high - _scaled(y, panel.logarithmic)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    drawn = [_axes(_unscaled(low, panel.logarithmic), _unscaled(high, panel.logarithmic), last)]
    for number, line in enumerate(panel.lines):
        colour = _COLOURS[number % len(_COLOURS)]
        placed = [place(x, y) for x, y in line.points if _drawable(y, panel.logarithmic)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in placed)
        drawn.append(f'<g fill="{colour}"><polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>{dots}</g>')
    return "".join(drawn)


def _drawable(value: float, logarithmic: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not logarithmic)


def _scaled(value: float, logarithmic: bool) -> float:
    return math.log10(value) if logarithmic else value


def _unscaled(value: float, logarithmic: bool) -> float:
    return float(10**value) if logarithmic else value


def _axes(low: float, high: float, last: float) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - 24
    return (
        f'<path d="M{_LEFT},{_TOP} V{bottom} H{right}" fill="none" stroke="#d0d7de"/><g fill="#57606a">'
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{_LEFT}" y="{bottom + 16}">0</text><text x="{right}" y="{bottom + 16}" text-anchor="end">layer {last:g}</text></g>'
    )


def _grid(panel: GridPanel) -> str:
    """Rows down, columns across; the darker, the nearer to 1."""
    count = max(1, len(panel.labels))
    side = min(28.0, (_HEIGHT - _TOP - _BOTTOM) / count)
    drawn = []
    for row, values in enumerate(panel.values):
        y = _TOP + row * side
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + side / 2 + 4:.1f}" text-anchor="end">{_text(panel.labels[row])}</text>')
        for column, value in enumerate(values):
            shade, x = min(1.0, max(0.0, value)), _LEFT + column * side
            ink = "#ffffff" if shade > 0.5 else "#1f2328"
            drawn.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" fill="#1f6feb" fill-opacity="{shade:.3f}" '
                f'stroke="#d0d7de"/><text x="{x + side / 2:.1f}" y="{y + side / 2 + 3:.1f}" font-size="9" text-anchor="middle" '
                f'fill="{ink}">{value:.2f}</text>'
            )
    for column, label in enumerate(panel.labels):
        x, y = _LEFT + (column + 0.5) * side, _TOP + count * side + 13
        drawn.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{_text(label)}</text>')
    return "".join(drawn)
