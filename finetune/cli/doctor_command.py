"""`finetune doctor`: what is wrong with a run; or what this machine can do, and what each missing part would give."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import api
from finetune.cli.diagnosis_view import show_run
from finetune.cli.options import Json
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.inventory import Inventory

_GIB = 2**30


def doctor(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run directory, finished or not.")] = None,
    machine: Annotated[bool, typer.Option("--machine", help="Report devices, memory, disk, libraries and optional parts.")] = False,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="NEW", help="Newer data: is the loss on it higher than on validation rows?")
    ] = None,
    as_json: Json = False,
) -> None:
    """Diagnose a RUN from what it left on disk: what is wrong, by which figures, why, and the change as a ready `-o`.

    Silent where all is well, but for the rules that ran and those that could not; keeps RUN/doctor.json. Exit code 0 also with findings.

    With --machine: what this machine has and what it lacks; writes nothing and asks no network.
    """
    _require_one(run, machine, against)
    if run is not None:
        show_run(run, against, as_json=as_json)
        return
    found = api.inventory()
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=2) + "\n")
    else:
        _show(found)


def _require_one(run: Path | None, machine: bool, against: Path | None) -> None:
    """ConfigError unless either a run or this machine is to be looked at."""
    if run is None and not machine:
        raise ConfigError(
            "it is not said what to look at",
            where="finetune doctor",
            fix="finetune doctor RUN for a run; finetune doctor --machine for this machine",
        )
    if machine and (run or against):
        option = f"--against {against}" if against else str(run)
        raise ConfigError("--machine looks at this machine, not at a run", where=option, fix="leave one of the two out")


def _show(found: Inventory) -> None:
    from rich.table import Table
    from rich.text import Text

    from finetune.cli import view

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(found):
        facts.add_row(name, Text(value))
    parts = Table("optional part", "version", "what it gives", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, part in found.parts.items():
        gives = part["gives"] or ""
        missing = part["version"] is None
        text = f"{gives}\n{part['install']}" if missing and part["install"] else gives
        parts.add_row(name, Text(part["version"] or "missing", style="yellow" if missing and part["install"] else ""), Text(text))
    view.out.print(facts, soft_wrap=False)
    view.out.print()
    view.out.print(parts, soft_wrap=False)


def _facts(found: Inventory) -> Iterator[tuple[str, str]]:
    yield "trains on", found.summary
    for number, gpu in enumerate(found.gpus):
        bf16 = "bf16" if gpu.bf16 else "no bf16"
        memory = f"{gpu.free_bytes / _GIB:.0f} of {gpu.memory_bytes / _GIB:.0f} GiB free"
        yield f"GPU {number}", f"{gpu.name}, {memory}, capability {gpu.capability}, {bf16}"
    for problem in found.problems:
        yield "problem", problem
    yield "cores", f"{found.cores} for this process"
    yield "memory", f"{found.available_bytes / _GIB:.1f} of {found.memory_bytes / _GIB:.1f} GiB available"
    yield "bf16", "matrix products in hardware" if found.bf16 else "no matrix instructions: `precision: auto` takes fp32"
    yield "attention", found.attention
    yield "several devices", f"through {' and '.join(found.collectives)}" if found.collectives else "torch was built without them"
    for place in found.places:
        yield f"disk, {place.use}", f"{place.free_bytes / _GIB:.1f} GiB free, {place.path}"
    yield (
        "hub",
        f"not asked ({found.offline} is set): what is on this machine must do" if found.offline else "asked where a model is not here",
    )
    yield "libraries", ", ".join(f"{name} {version}" for name, version in found.versions.items())
