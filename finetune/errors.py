"""The errors a user can act on, and the exit code of each.

    FinetuneError                 1
    ├── ConfigError               2   the YAML file, an override, or a combination of keys
    ├── DataError                 3   a data file, a row, a chat template
    ├── HardwareError             4   memory, disk, a device or a library this machine lacks
    │   └── WorkerLostError           another process of the same run, which says itself why it ended
    ├── DivergedError             5   a loss or gradient that is not finite
    ├── VerificationError         6   a checkpoint, an adapter or a merge that is not what it claims to be
    └── RunInterruptedError      130/143   SIGINT / SIGTERM, with a checkpoint saved

Every error has three parts: what went wrong, where, and how to mend it. One error may carry several problems, because a user
should not have to run a command five times to find five typos.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    what: str
    where: str = ""
    fix: str = ""
    excerpt: str = ""
    """The offending line, with a caret below it where the column is known."""

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        lines.extend(f"    {line}" for line in self.excerpt.splitlines())
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class FinetuneError(Exception):
    """Base of every error that is shown without a traceback."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "", excerpt: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, where, fix, excerpt),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def from_problems(cls, problems: Iterable[Problem]) -> Self:
        """One error for all ``problems`` (at least one)."""
        found = tuple(problems)
        error = cls(found[0].what, where=found[0].where, fix=found[0].fix, excerpt=found[0].excerpt)
        error.problems = found
        error.args = ("\n".join(str(problem) for problem in found),)
        return error


class ConfigError(FinetuneError):
    """The configuration is wrong: nothing was downloaded, loaded or written."""

    exit_code = 2


class DataError(FinetuneError):
    """A data file, a row or a template is wrong: nothing was trained or cached."""

    exit_code = 3


class HardwareError(FinetuneError):
    """This machine lacks the memory, disk, device or library that the run needs."""

    exit_code = 4


class WorkerLostError(HardwareError):
    """Another process of the run ended or cannot be reached; its own message says why."""

    told_to_stop = False
    """Whether this process was told to stop before it noticed."""


class DivergedError(FinetuneError):
    """The loss or a gradient stopped being finite."""

    exit_code = 5


class VerificationError(FinetuneError):
    """A file is not what it claims to be, or two models that must agree do not."""

    exit_code = 6


class RunInterruptedError(FinetuneError):
    """A signal ended the run after a checkpoint was saved."""

    exit_code = 130

    def __init__(self, what: str, *, signal_number: int, where: str = "", fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = 128 + signal_number
