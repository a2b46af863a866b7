"""`finetune eval`: its options, and what is shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune import api
from finetune.cli.options import Json, Overrides

_Targets = Annotated[
    list[str],
    typer.Argument(metavar="TARGET...", help="Runs, adapter or model directories, hub ids (owner/name@COMMIT), builtin:smollm2-135m."),
]
_Config = Annotated[
    Path | None, typer.Option("--config", metavar="EVAL.yaml", help="An `evaluation:` section to use instead of the first run's.")
]
_Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="The model under adapter directories that do not know theirs.")]
_Name = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="Of the file eval/NAME.json, in the first run or the working directory. Default: results; comparison, of a run beside others; "
        "or the name of EVAL.yaml.",
    ),
]


def evaluate(
    targets: _Targets,
    config: _Config = None,
    base: _Base = None,
    name: _Name = None,
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Measure runs, adapters and models side by side with what they were trained from.

    The tasks are those of EVAL.yaml, or else of the first run: loss, generation, multiple choice, knowledge, forgetting, the harness.
    Every figure has a 95 % interval, every difference from the base a verdict; all of it is kept in eval/NAME.json.
    """
    from finetune.cli import view

    with view.counting("measuring") as advance:
        results = api.evaluate(
            targets[0],
            targets[1:],
            override or (),
            settings=config,
            base=base,
            name=name,
            progress=lambda task, system, count: advance(f"{task}, {system}", count),
            notice=view.note,
        )
    kept = results.record["kept"]
    run = Path(kept).parents[1]
    page = api.report(run) if (run / "environment.json").is_file() else None
    if as_json:
        sys.stdout.write(json.dumps(results.as_dict(), indent=2) + "\n")
        return
    view.show_results(results)
    view.path(f"\nmeasured in {results.seconds:.0f} s; figures in {kept}" + (f", page in {page}" if page else ""))
