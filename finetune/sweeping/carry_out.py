"""Every run of a sweep, each a command of its own: trained, measured, and passed over where that was done before.

What a run leaves behind is its directory and nothing else, so that a sweep that was interrupted, or killed, goes on where it stood, and a
run that diverged or ran out of memory does not end the others.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from finetune.config.dump import leaves
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.config.sweep import Case, Planned
from finetune.config.tree import dotted
from finetune.errors import ConfigError, Problem, RunInterruptedError
from finetune.runs import RunDirectory
from finetune.sweeping.measured import is_measured_alone

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SHARED_FAULTS = (2, 3)
"""Exit codes of a wrong configuration or wrong data: where the first run has one, the next would have it too."""
_MEANINGS = {
    1: "a bug",
    2: "the configuration is wrong",
    3: "the data are wrong",
    4: "this machine lacks memory, disk, a device or a library",
    5: "it diverged",
    6: "a file is not what it claims to be",
}

Doing = Literal["training", "measuring", "done already"]
Tell = Callable[[int, int, Case, Doing], None]
"""(number of the run, of how many, the run, what is done now)"""
Command = Callable[[Sequence[str]], int]
"""Runs `finetune ARGUMENTS`; returns its exit code."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    case: Case
    failure: str | None
    """Why it has no figures; None where it has."""
    code: int = 0
    """Exit code of the command that failed."""


def run_command(arguments: Sequence[str]) -> int:
    """`finetune ARGUMENTS` in a process of its own, whose messages are seen; a signal is passed on, and raised when it has ended."""
    line = [sys.executable, "-m", "finetune", *arguments]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, process_group=0) as child, _passing_on(child) as received:
        code = child.wait()
    if received:
        raise RunInterruptedError("the sweep was stopped by a signal", signal_number=received[0], where=" ".join(arguments[:2]))
    return code


@contextmanager
def _passing_on(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """The signals that came meanwhile."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        # of a terminal that was closed a run knows nothing: it is asked to save and end
        child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    ours = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]  # ignored under nohup
    before = {number: signal.signal(number, forward) for number in ours}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def carry_out(
    planned: Planned, tell: Tell = lambda *_: None, command: Command = run_command, check: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """Train and measure what is not there yet. ConfigError where a directory holds another run than the sweep wants there.

    ``check`` sees each outcome before the next run begins, and may raise what would be wrong with all of them.
    """
    _require_same(planned)
    outcomes = []
    for number, (case, _) in enumerate(planned.cases, 1):

        def told(doing: Doing, number: int = number, case: Case = case) -> None:
            tell(number, len(planned.cases), case, doing)

        try:
            outcomes.append(_one(planned, case, told, command))
            check(outcomes[-1])
        except RunInterruptedError as error:
            raise RunInterruptedError(
                f"stopped at run {number} of {len(planned.cases)}, {case.run.name}",
                signal_number=error.exit_code - 128,
                where=str(planned.directory),
                fix="run the same command again: it goes on from there",
            ) from None
    return outcomes


def _one(planned: Planned, case: Case, told: Callable[[Doing], None], command: Command) -> Outcome:
    run = RunDirectory(case.run)
    if run.environment.is_file() and run.is_finished():
        told("done already")
    else:
        told("training")
        begun = ["--resume"] if run.environment.is_file() else []
        code = command(["train", str(planned.path), *(part for each in case.overrides for part in ("-o", each)), *begun])
        if code in _SHARED_FAULTS and case == planned.cases[0][0]:
            raise ConfigError(f"run {case.run.name} could not begin: {_meaning(code)}, as told above", where=str(planned.path))
        if code:
            return Outcome(case, f"training: {_meaning(code)}", code)
    if planned.sweep.evaluate and not _is_measured(run):
        told("measuring")
        if code := command(["eval", str(case.run)]):
            return Outcome(case, f"measuring: {_meaning(code)}", code)
    return Outcome(case, None)


def _meaning(code: int) -> str:
    return _MEANINGS.get(code, f"it ended with exit code {code}") if code >= 0 else f"it was killed by signal {-code}"


def _is_measured(run: RunDirectory) -> bool:
    """Whether the figures are those of the result that lies there, of it alone, and with what they were summed from.

    A run that was made longer is measured again, and so is one that was last measured beside others.
    """
    results, result = run.results, run.trained()
    if result is None or not results.is_file() or results.stat().st_mtime < (result / "MANIFEST.json").stat().st_mtime:
        return False
    return is_measured_alone(run)


# --- what lies there already ---------------------------------------------------------------------------------------------------------


def _require_same(planned: Planned) -> None:
    problems = []
    for case, loaded in planned.cases:
        stored = RunDirectory(case.run).config
        if stored.is_file() and (changed := _differences(load_config(stored).config, loaded.config)):
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            what = f"{case.run.name} was trained with another configuration: {', '.join(changed[:4])}{more}"
            problems.append(Problem(what, str(case.run), "give the sweep another `output`, or remove that run"))
    if problems:
        raise ConfigError.from_problems(problems)


def _differences(left: Config, right: Config) -> list[str]:
    """Keys whose values differ."""
    mine, others = _flat(left), _flat(right)
    return sorted(key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key))


def _flat(config: Config) -> Mapping[str, Any]:
    return {dotted(path): value for path, value in leaves(config).items() if path != ("output",)}
