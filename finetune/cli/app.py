"""The command line: one function a command, each a few lines over `finetune.api`.

What draws (rich) is imported inside the commands, so that `finetune --help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from finetune import __version__, api, process
from finetune.cli import (
    analyze_command,
    combine_command,
    config_commands,
    data_commands,
    doctor_command,
    eval_command,
    merge_command,
    plan_command,
    report_command,
    sweep_command,
)
from finetune.cli.options import ConfigPath, Json, Overrides
from finetune.cli.streams import outlive_readers
from finetune.cli.workers import is_first, is_mine_to_tell
from finetune.errors import FinetuneError
from finetune.training.signals import ASKED, stays_ignored

app = typer.Typer(
    name="finetune",
    help="Adapt open language models from one YAML file: checked, trained, measured, merged and verified.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"finetune {__version__}")
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


app.command("init")(config_commands.init)
app.add_typer(config_commands.app, name="config")
app.add_typer(data_commands.app, name="data")
app.command("plan")(plan_command.plan)


@app.command()
def train(
    config: ConfigPath,
    override: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that lies in the output directory.")] = False,
    accept: Annotated[
        list[str] | None,
        typer.Option("--accept", metavar="KEY", help="With --resume: go on although KEY, such as `data`, changed; it is recorded."),
    ] = None,
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="Worker processes, one a device. Default: all GPUs.")] = None,
    as_json: Json = False,
) -> None:
    """Train as CONFIG says; prints the run directory last.

    Configuration, data and targets are checked before anything is written.
    Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 finishes the step, saves a checkpoint and says how to resume; a second one stops at once.
    A run is made longer with `--resume -o train.epochs=3`.
    """
    from finetune.cli import view
    from finetune.cli.next_steps import next_steps
    from finetune.cli.training_view import TrainingView
    from finetune.config.notes import unusual_rates
    from finetune.hardware import adopt_srun

    adopt_srun()
    loaded = api.load_config(config, override or ())
    code = api.launch(sys.argv[1:], devices)
    if code is not None:
        raise typer.Exit(code)
    for note in unusual_rates(loaded.config) if is_first() else ():
        view.note(f"note: {note}")
    with TrainingView(loaded.config).running() as watching:
        watcher = watching if is_first() else None
        run = api.train(loaded.config, watcher, resume=resume, accept=accept or (), origins=loaded.origins)
    if is_first():
        api.report(run.path)
        view.path(next_steps(run, api.load_config(run.config).config.tuning))
        _print_path("run", run.path, as_json=as_json)


app.command("eval")(eval_command.evaluate)
app.command("sweep")(sweep_command.sweep)
app.command("merge")(merge_command.merge)
app.command("combine")(combine_command.combine)
app.command("doctor")(doctor_command.doctor)
app.command("analyze")(analyze_command.analyze)
app.command("report")(report_command.report)


def _print_path(name: str, path: Path, *, as_json: bool) -> None:
    sys.stdout.write((json.dumps({name: str(path)}) if as_json else str(path)) + "\n")


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """Outside of training, which finishes its step, a signal ends the command at once. What it was writing is removed on the way out.

    Not by an Exception, which libraries that are just being imported would swallow or wrap; and with nothing imported to say it.
    """
    del frame
    code = 130 if number == signal.SIGINT else 143
    if is_first():
        os.write(2, b"interrupted; nothing was left half-written\n")
    for again in ASKED:  # a second one is not for us to handle
        signal.signal(again, signal.SIG_DFL)
    sys.exit(code)


def main() -> NoReturn:
    """Run the command line; errors become messages and exit codes."""
    process.own()
    outlive_readers()
    for number in ASKED:
        if not stays_ignored(number):
            signal.signal(number, _interrupted)
    if "--debug" in sys.argv:  # wherever it stands
        sys.argv.remove("--debug")
        os.environ["FINETUNE_DEBUG"] = "1"
    try:
        app()
    except FinetuneError as error:
        _fail(error)
    sys.exit(0)


def _fail(error: FinetuneError) -> NoReturn:
    if os.environ.get("FINETUNE_DEBUG"):
        traceback.print_exception(error)
    if is_mine_to_tell(error):
        from finetune.cli import view

        view.show_error(error)
    sys.exit(error.exit_code)
