"""What each of two processes does: several trainings in one start, since a start costs more than a small run.

Arguments: a JSON file of configurations to train, one after the other; the first process stops the one called `stopped` after two steps.
Then `same_arithmetic` of `spread.py` where a model directory is given.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

from finetune import api
from finetune.errors import RunInterruptedError
from finetune.training.metrics import StepDone


def stop_at(step: int):
    def observe(event: object) -> None:
        if isinstance(event, StepDone) and event.step == step and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    return observe


def main() -> None:
    faulthandler.dump_traceback_later(600, exit=True)  # processes that wait for each other say where
    for name, path in json.loads(Path(sys.argv[1]).read_text()).items():
        config = api.load_config(Path(path)).config
        if name != "stopped":
            api.train(config)
            continue
        try:
            api.train(config, stop_at(2))
        except RunInterruptedError:
            print("stopped", flush=True)
    if len(sys.argv) > 2:
        sys.path.insert(0, str(Path(__file__).parent))
        from spread import compare

        compare(Path(sys.argv[2]), Path(sys.argv[3]))


main()
