"""`finetune config check | show | schema` and `finetune init`: everything about the YAML file, without loading a model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.options import ConfigPath, Json, Overrides
from finetune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from finetune.config.load import Loaded
    from finetune.config.schema import Config
    from finetune.config.shipped import Recipe

_PLACE = re.compile(r":(\d+)(?::(\d+))?$")
"""The end of `FILE:LINE:COLUMN`, as problems are placed."""

app = typer.Typer(help="Check, show and document the YAML file.", no_args_is_help=True)


@app.command()
def check(config: ConfigPath, override: Overrides = None, as_json: Json = False) -> None:
    """Find every problem of CONFIG, without loading or downloading anything.

    Reads only the YAML file: data files are noted if they are missing, not read.
    """
    from finetune.config.load import load_config
    from finetune.config.notes import missing_sources, unusual_rates

    try:
        loaded = load_config(config, override or ())
    except ConfigError as error:
        if as_json:
            problems = [problem_as_json(problem) for problem in error.problems]
            _print_json({"config": str(config), "valid": False, "notes": [], "problems": problems})
        raise
    notes = [*missing_sources(loaded.config), *unusual_rates(loaded.config)]
    if notes:
        from finetune.cli import view

        for note in notes:
            view.note(f"note: {note}")
    if as_json:
        _print_json({"config": str(loaded.path), "valid": True, "notes": notes, "problems": []})
    else:
        typer.echo(f"{loaded.path}: valid")


@app.command()
def show(
    config: ConfigPath,
    override: Overrides = None,
    any_machine: Annotated[
        bool, typer.Option("--any-machine", help="Leave every `auto` open instead of deciding it for this machine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print every value of CONFIG, defaults included, and where each comes from.

    The output is itself a valid configuration.
    """
    from finetune.config.dump import show_config
    from finetune.config.load import load_config

    loaded = load_config(config, override or ())
    reasons = {} if any_machine else _reasons(loaded.config)
    if as_json:
        _print_json(shown_as_json(loaded, reasons))
    else:
        sys.stdout.write(show_config(loaded.config, loaded.origins, reasons))


@app.command()
def schema(
    preset: Annotated[bool, typer.Option("--preset", help="For recipes and other presets, where nothing is required.")] = False,
) -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from finetune.config.json_schema import config_schema, preset_schema, to_text

    sys.stdout.write(to_text(preset_schema() if preset else config_schema()))


def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File to write.")] = Path("finetune.yaml"),
    recipe: Annotated[str, typer.Option("--recipe", metavar="NAME", help="Which goal; `--list` shows them.")] = "instruction",
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes, one line each.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite PATH.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented configuration that runs, from a recipe."""
    from finetune.config.shipped import recipes
    from finetune.config.starter import write_starter

    if list_recipes:
        _print_recipes(recipes(), as_json=as_json)
        return
    write_starter(path, recipe, force=force)
    typer.echo(f"next: finetune config check {path}", err=True)
    if as_json:
        _print_json({"config": str(path)})
    else:
        typer.echo(str(path))


def problem_as_json(problem: Problem) -> dict[str, str | int | None]:
    """What `config check --json` prints of a problem; ``line`` and ``column``, from 1, are null where none is known, as of an override."""
    place = None if problem.where.startswith("-o ") else _PLACE.search(problem.where)
    line, column = (int(number) if number else None for number in place.groups()) if place else (None, None)
    return {"what": problem.what, "where": problem.where, "line": line, "column": column, "fix": problem.fix}


def shown_as_json(loaded: Loaded, reasons: Mapping[str, str]) -> dict[str, Any]:
    """What `config show --json` prints."""
    return {
        "config": loaded.config.model_dump(mode="json"),
        "origins": {key: asdict(origin) for key, origin in loaded.origins.items()},
        "reasons": dict(reasons),
    }


def _print_recipes(found: Sequence[Recipe], *, as_json: bool) -> None:
    if as_json:
        _print_json([{"name": recipe.name, "summary": recipe.summary} for recipe in found])
        return
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        typer.echo(f"{recipe.name:<{width}}  {recipe.summary}")


def _reasons(config: Config) -> dict[str, str]:
    """What each "auto" becomes on this machine, and why. Loads torch, to see the devices."""
    from finetune.hardware import detect
    from finetune.planning.resolve import resolve

    decided = resolve(config, detect()).as_dict()
    keys = {"compute_dtype": "quantization.compute_dtype"}
    return {
        keys.get(name, f"train.{name}"): _sentence(choice) for name, choice in decided.items() if not choice["reason"].startswith("stated")
    }


def _sentence(choice: Mapping[str, Any]) -> str:
    return f"here {json.dumps(choice['value']).strip(chr(34))}: {choice['reason']}"


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
