"""A diagnosis on one screen of 80 columns."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import api

if TYPE_CHECKING:
    from rich.text import Text

    from finetune.reporting.doctor import Diagnosis, Finding

_WIDEST = 110
_INDENT = 10


def show_run(run: Path, against: Path | None, *, as_json: bool) -> None:
    """Diagnose ``run`` and print what was found."""
    from finetune.cli import view

    with view.counting("measuring") as advance:
        found = api.diagnose(run, against, advance)
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=2, allow_nan=False) + "\n")
        return
    for part in _parts(found, run):
        view.out.print(part)


def _parts(found: Diagnosis, run: Path) -> Iterator[Text]:
    from rich.text import Text

    from finetune.cli.preview import visible

    steps = f"{found.steps:,} of {found.planned_steps:,} steps"
    yield Text(visible(f"{run}: {found.state}, {steps}"), style="bold")
    yield Text()
    for finding in found.findings:
        yield from _finding(finding)
        yield Text()
    for note in found.notes:
        yield _wrapped("damage", visible(note), "bold yellow")
        yield Text()
    if not found.findings:
        yield Text(_all_well(found))
        yield Text()
    if found.drift:
        yield Text(_drift(found))
        yield Text()
    yield _wrapped("ran", ", ".join(found.ran) or "no rule")
    for rule, why in found.not_run.items():
        yield _wrapped("not run", visible(f"{rule}: {why}"))
    if any(finding.overrides for finding in found.findings):
        yield Text()
        yield Text(visible(f"a new run with changes: finetune train {shlex.quote(str(run / 'config.yaml'))} -o output=NEW -o ..."))


def _all_well(found: Diagnosis) -> str:
    if not found.ran:
        return "no rule could run, so nothing is known"
    rules = f"{len(found.ran)} rule{'s' * (len(found.ran) != 1)}"
    return f"nothing wrong was found by the {rules} that could run" if found.not_run else f"nothing wrong was found by all {rules}"


def _finding(finding: Finding) -> Iterator[Text]:
    from rich.text import Text

    from finetune.cli.preview import visible
    from finetune.reporting.wording import figure

    style = "bold red" if finding.severity == "problem" else "bold yellow"
    yield _wrapped(finding.severity, visible(f"{finding.rule}: {finding.what}"), style)
    yield _wrapped("figures", visible(", ".join(f"{name} {figure(value)}" for name, value in finding.evidence.items())))
    yield _wrapped("reason", visible(finding.reason))
    if finding.overrides:
        options = " ".join(f"-o {shlex.quote(override)}" for override in finding.overrides)
        yield Text.assemble((f"{'change':<{_INDENT}}", "bold"), visible(options))  # never broken, so that it can be copied


def _drift(found: Diagnosis) -> str:
    drift = found.drift or {}
    low, high = (f"{drift[f'difference of the losses, {end}']:+.3f}" for end in ("low", "high"))
    return (
        f"on newer data the loss is {drift['loss on newer rows']:.3f}, on validation rows {drift['loss on validation rows']:.3f}: "
        f"{drift['difference of the losses']:+.3f} (95 %: {low} to {high})"
    )


def _wrapped(label: str, text: str, style: str = "bold") -> Text:
    """``text`` beside its label, further lines indented as the first."""
    from rich.text import Text

    from finetune.cli import view

    width = min(view.out.width, _WIDEST)
    return Text.assemble((f"{label:<{_INDENT}}", style), view.wrapped(text, _INDENT, width))
