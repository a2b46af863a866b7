"""The peak memory of commands, each in a process of its own that is forked from this one, since to import anew takes seconds each.

One command a line on stdin, its arguments as a JSON list; on stdout for each of them [exit code, MiB at the peak, MiB of them that are
the process's own pages (RssAnon)]. Pages of the program's files are not all counted: a fork maps them only when it touches them.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from tests.warm import forked

EVERY_S = 0.003
"""Between two looks at the own pages, of which the kernel keeps no peak."""


def run(arguments: list[str]) -> int:
    """The command as `python -m finetune` would run it, its figures on file descriptor 1 and what it says on stderr."""
    sys.argv, sys.stdout = ["finetune", *arguments], sys.stderr
    own, done = [memory("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(EVERY_S):
            own[0] = max(own[0], memory("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    code = 0
    try:
        from finetune.cli.app import main

        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    done.set()
    os.write(1, json.dumps([code, memory("VmHWM"), own[0]]).encode() + b"\n")
    return code


def memory(name: str) -> float:
    """MiB that the kernel gives for this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    for child in forked(run, "evaluation.evaluate"):
        os.waitpid(child, 0)
