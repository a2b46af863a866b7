"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; `configs/quickstart.yaml` and others ship with the package.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory written by `finetune train`.")]
Overrides = Annotated[
    list[str] | None, typer.Option("-o", "--override", metavar="KEY=VALUE", help="Replace one value, such as `-o train.epochs=3`.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, everything else on stderr.")]
