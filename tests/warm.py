"""A process that has imported the heavy libraries and forks for every command, since to import them anew takes seven CPU seconds each.

Each command still is a process of its own, with its own arguments, directory, environment, streams and exit code; only what Python and the
libraries read from the environment while they are imported is this process's. One request a line on stdin, as JSON; for each the child's
id, and when it has ended its exit code.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

MODULES = ("analysis.analyze", "evaluation.evaluate", "merging.combine", "merging.merge_run", "training.train")


def forked(run: Callable[[Any], int], *modules: str) -> Iterator[int]:
    """Import ``modules`` of finetune, then fork for every line of stdin and yield the child's id, which is to be waited for.

    The child gives ``run`` what the line holds as JSON, and ends with the exit code that it returns.
    """
    from finetune.process import prepare

    prepare()
    for module in modules:
        import_module(f"finetune.{module}")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(run(json.loads(line)))
        yield child


def run(request: dict[str, Any]) -> int:
    """The command of ``request`` as `python -m finetune` would run it."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), (request["out"], os.O_WRONLY), (request["err"], os.O_WRONLY)]):
        os.dup2(os.open(path, flags), number)
    sys.argv = ["finetune", *request["arguments"]]
    code = 0
    try:
        from finetune.cli.app import main

        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:  # noqa: BLE001 - as the interpreter does with what nobody caught
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    for child in forked(run, *MODULES):
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
