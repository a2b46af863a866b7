"""`finetune report`: one page of one or several runs, and its curves as pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from finetune import api
from finetune.cli.options import Json


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories written by `finetune train`.")],
    page: Annotated[
        Path | None, typer.Option("-O", "--output", metavar="FILE", help="Where the page goes. Default: RUN/report.html of a single run.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="DIR", help="Also write each chart as a PNG file for papers.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a RUN is and what its last evaluation found, and write one page that opens from disk and loads nothing.

    The page has the curves, samples, evaluation, diagnosis, merge, plan, configuration and environment.
    Several runs are compared: curves overlaid, settings that differ, figures side by side.
    """
    if png is not None:
        api.require_png(png)
    written = api.report(*runs, page=page)
    pictures = api.report_png(*runs, directory=png) if png is not None else []
    if as_json:
        _print_json(runs, written, pictures)
    elif len(runs) == 1:
        _show(runs[0], written, pictures)
    else:
        sys.stdout.write("".join(f"{path}\n" for path in (written, *pictures)))


def _print_json(runs: Sequence[Path], page: Path, pictures: Sequence[Path]) -> None:
    found = [_as_json(run) for run in runs]
    told: dict[str, object] = {**found[0]} if len(found) == 1 else {"runs": found}
    told |= {"report": str(page)} | ({"png": [str(path) for path in pictures]} if pictures else {})
    sys.stdout.write(json.dumps(told, indent=2) + "\n")


def _as_json(run: Path) -> dict[str, object]:
    results = api.stored_results(run)
    named = {name: found.as_dict() for name, found in api.named_results(run).items()}
    return {
        "results": results.as_dict() if results else None,
        "evaluations": named,
        **{name: str(path) for name, path in api.places(run).items()},
    }


def _show(run: Path, page: Path, pictures: Sequence[Path]) -> None:
    from finetune.cli import view

    results, places, named = api.stored_results(run), api.places(run), api.named_results(run)
    if results:
        view.show_results(results)
    elif named:
        for name, found in named.items():
            view.out.print(f"eval/{name}", style="bold")
            view.show_results(found)
            view.out.print()
    elif "adapter" in places or "model" in places:
        view.path(f"not evaluated yet: finetune eval {run}")
    else:
        view.path(f"not finished: finetune train {run / 'config.yaml'} --resume")
    files = {f"evaluation {Path(name).stem}": run / "eval" / name for name in named}
    view.show_places({**places, **files, "report": page} | ({"pictures": pictures[0].parent} if pictures else {}))
