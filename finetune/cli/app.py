"""The command line: one function a command, each a few lines over `finetune.api`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import click
import typer

from finetune import __version__, api
from finetune.cli import config_commands, view
from finetune.errors import FinetuneError

app = typer.Typer(
    name="finetune",
    help="Adapt open language models from one YAML file: checked, trained, measured, merged and verified.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(config_commands.app, name="config")
app.command("init")(config_commands.init)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; `configs/quickstart.yaml` and others ship with the package.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory written by `finetune train`.")]
Overrides = Annotated[
    list[str] | None, typer.Option("-o", "--override", metavar="KEY=VALUE", help="Replace one value, such as `-o train.epochs=3`.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, everything else on stderr.")]


def _version(shown: bool) -> None:
    if shown:
        view.out.print(f"finetune {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Adapt open language models from one YAML file: checked, trained, measured, merged and verified."""
    del version
    if debug:
        os.environ["FINETUNE_DEBUG"] = "1"


@app.command()
def train(
    config: Config,
    override: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that lies in the output directory.")] = False,
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="Worker processes, one a device. Default: all GPUs.")] = None,
    as_json: Json = False,
) -> None:
    """Train as CONFIG says; prints the run directory last.

    Checks configuration, data and targets before anything is written. Ctrl-C or SIGTERM finishes the step, saves a checkpoint and says
    how to resume.
    """
    loaded = api.load_config(config, override or ())
    code = api.launch(sys.argv[1:], devices)
    if code is not None:
        raise typer.Exit(code)
    is_first = os.environ.get("RANK", "0") == "0"
    with view.TrainingView().running() as watching:
        run = api.train(loaded.config, watching if is_first else None, resume=resume)
    if is_first:
        api.report(run.path)
        _print_path("run", run.path, as_json=as_json)


@app.command("eval")
def evaluate(
    run: Run,
    models: Annotated[
        list[Path] | None, typer.Argument(metavar="[MODEL]...", help="Further model directories, such as a merged one.")
    ] = None,
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Measure a finished RUN: the base and the tuned model side by side, on the tasks of its configuration.

    Keeps the figures in RUN/eval/results.json and refreshes RUN/report.html.
    """
    with view.counting("measuring") as advance:
        results = api.evaluate(run, models or (), override or (), lambda task, system, count: advance(f"{task}, {system}", count))
    report = api.report(run)
    if as_json:
        sys.stdout.write(json.dumps(results.as_dict(), indent=2) + "\n")
        return
    view.out.print(view.results_table(results))
    view.show_samples(results.samples)
    view.note(f"\nmeasured in {results.seconds:.0f} s; figures in {run / 'eval' / 'results.json'}, page in {report}")


@app.command()
def report(run: Run, as_json: Json = False) -> None:
    """Write RUN/report.html: curves, figures, answers and settings on one page that opens from disk."""
    _print_path("report", api.report(run), as_json=as_json)


def _print_path(name: str, path: Path, *, as_json: bool) -> None:
    sys.stdout.write((json.dumps({name: str(path)}) if as_json else str(path)) + "\n")


def main() -> NoReturn:
    """Run the command line; errors become messages and exit codes."""
    try:
        code = app(standalone_mode=False)
    except FinetuneError as error:
        _fail(error, error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        view.note("interrupted; nothing of the current step was kept")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe went away: not our error, and nothing more can be written to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code or 0)


def _fail(error: FinetuneError, code: int) -> NoReturn:
    if os.environ.get("FINETUNE_DEBUG"):
        raise error
    if os.environ.get("RANK", "0") == "0":
        view.show_error(error)
    sys.exit(code)
