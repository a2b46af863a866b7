"""One self-contained HTML page of a run: settings, curves, evaluation, samples, merge. Opens from disk, loads nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, select_autoescape

from finetune.runs import RunDirectory
from finetune.sealed import read_json, write_text

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 220, 64, 28


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(optimizer step, value)"""


def write_report(run: RunDirectory) -> Path:
    """Write `report.html` from the run's files alone; returns its path. All text from models and data is escaped."""
    rows = run.metric_rows()
    steps = [row for row in rows if row["kind"] == "step"]
    loss = [
        Curve("training", _points(steps, "loss")),
        Curve("validation", _points([r for r in rows if r["kind"] == "evaluation"], "validation_loss")),
    ]
    charts = [
        ("Loss (nats a supervised token)", chart(loss)),
        ("Learning rate", chart(_rates(steps))),
        ("Tokens a second", chart([Curve("tokens/s", tuple((r["step"], r["tokens"] / r["seconds"]) for r in steps))])),
    ]
    template = Environment(autoescape=select_autoescape(default=True)).from_string(
        resources.files("finetune.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    write_text(
        run.report,
        template.render(
            name=run.path.name,
            charts=charts,
            config=run.config.read_text(encoding="utf-8"),
            plan=_optional(run.plan),
            environment=_optional(run.environment),
            results=_optional(run.evaluations / "results.json"),
            merge=_optional(run.path / "merge.json"),
            pretty=lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        ),
    )
    return run.report


def _optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _points(rows: Sequence[dict[str, Any]], key: str) -> tuple[tuple[float, float], ...]:
    return tuple((row["step"], row[key]) for row in rows)


def _rates(steps: Sequence[dict[str, Any]]) -> list[Curve]:
    names = list(steps[0]["learning_rates"]) if steps else []
    return [Curve(name, tuple((row["step"], row["learning_rates"][name]) for row in steps)) for name in names]


def chart(curves: Sequence[Curve]) -> str:
    """An SVG line chart; an empty string where there is nothing to draw."""
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return ""
    xs = [x for curve in drawn for x, _ in curve.points]
    ys = [y for curve in drawn for _, y in curve.points]
    low, high = min(ys), max(ys)
    high = high if high > low else low + (abs(low) or 1.0)
    last = max(*xs, 1)

    def place(x: float, y: float) -> str:
        across = _LEFT + x / last * (_WIDTH - _LEFT - 8)
        down = 8 + (high - y) / (high - low) * (_HEIGHT - _BOTTOM - 8)
        return f"{across:.1f},{down:.1f}"

    lines = [
        f'<polyline class="c{number}" points="{" ".join(place(x, y) for x, y in curve.points)}"/>'
        + "".join(
            f'<circle class="c{number}" r="3" cx="{(p := place(x, y)).split(",")[0]}" cy="{p.split(",")[1]}"/>'
            for x, y in curve.points
            if len(curve.points) < 12
        )
        for number, curve in enumerate(drawn)
    ]
    legend = "".join(
        f'<text class="c{number}" x="{_WIDTH - 8}" y="{20 + 16 * number}" text-anchor="end">{html.escape(curve.name)}</text>'
        for number, curve in enumerate(drawn)
    )
    axis = (
        f'<text x="{_LEFT - 6}" y="16" text-anchor="end">{high:.3g}</text>'
        f'<text x="{_LEFT - 6}" y="{_HEIGHT - _BOTTOM}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">0</text><text x="{_WIDTH - 8}" y="{_HEIGHT - 8}" text-anchor="end">step {last:g}</text>'
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{axis}{"".join(lines)}{legend}</svg>'
