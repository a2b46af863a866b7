"""This project against its peers on the same work: `python -m benchmarks.engine`.

One tool alone, to see what a change does: `python -m benchmarks.engine --tool finetune --rows 100`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys

from benchmarks.engine import data, runs
from benchmarks.engine.tools import TOOLS


def one(chosen: argparse.Namespace) -> None:
    """One tool on some of the rows; prints its figures."""
    work, tool = runs.prepare_work(chosen.rows), TOOLS[chosen.tool]
    job = runs.job(work, tool, nf4=chosen.nf4, seed=chosen.seed, threads=chosen.threads)
    settings = tool.candidates[chosen.setting] if chosen.setting else tool.nf4_settings if chosen.nf4 else tool.settings
    print(json.dumps(runs.run(tool, job, work, settings), indent=1))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--tool", choices=TOOLS)
    parser.add_argument("--setting", help="one of the tool's candidates")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--rows", type=int, default=data.ROWS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the tool that runs is ended too
    one(chosen)


if __name__ == "__main__":
    main()
