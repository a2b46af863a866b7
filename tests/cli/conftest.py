"""A terminal, for what is drawn only there, and the command line without the seconds that a new process costs."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyte
import pytest
from typer.testing import CliRunner

from finetune.cli.app import app
from finetune.errors import FinetuneError


@pytest.fixture(scope="session")
def terminal() -> Callable[..., list[str]]:
    """(arguments, columns, folder, **environment) -> the lines that a terminal of that width shows at the end of the command.

    What asks for plain text (CI, NO_COLOR) comes from ``environment`` alone: these tests run under CI too.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR")}

    def run(arguments: list[str], columns: int, folder: Path, **environment: str) -> list[str]:
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", *arguments],
            stdout=follower,
            stderr=follower,
            stdin=follower,
            env={**inherited, "COLUMNS": str(columns), "LINES": "60", "TERM": "xterm-256color", **environment},
            cwd=folder,
        )
        os.close(follower)
        screen = pyte.Screen(columns, 60)
        stream = pyte.ByteStream(screen)
        while True:
            try:
                data = os.read(leader, 65536)
            except OSError:  # the other side closed
                break
            if not data:
                break
            stream.feed(data)
        process.wait()
        os.close(leader)
        return [line.rstrip() for line in screen.display]

    return run


class Called:
    """A command that ran in this process."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture(scope="session")
def call() -> Callable[..., Called]:
    """(*arguments) -> exit code, stdout and stderr (of an error its problems) of `finetune ARGUMENTS`."""

    def run(*arguments: object) -> Called:
        done = CliRunner().invoke(app, [*map(str, arguments)])
        if isinstance(done.exception, FinetuneError):
            return Called(done.exception.exit_code, done.stdout, str(done.exception))
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Called(done.exit_code, done.stdout, done.stderr)

    return run
