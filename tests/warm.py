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
from typing import Any


def serve() -> None:
    """Fork for every request until stdin ends."""
    from finetune.hardware import prepare_process

    prepare_process()
    import finetune.analysis.analyze
    import finetune.evaluation.evaluate
    import finetune.merging.combine
    import finetune.merging.merge_run
    import finetune.training.train  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(run(json.loads(line)))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


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
    serve()
