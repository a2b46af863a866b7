"""This project against its peers on the same work: `make bench`, or `python -m benchmarks.engine` where both environments are there.

Without options: every setting of the peers on some rows, to find the fastest of each, then rounds of all tools, LoRA and NF4 on all
rows, into docs/benchmarks/engine.json and engine.md. Finished runs are kept as they come; the same command goes on after an
interruption, and repeats what failed or what was measured on other code. Exit code 1 where a tool failed or a floor does not hold.

The same on fewer rows, kept beside the runs and not in docs/: `python -m benchmarks.engine --rows 24 --rounds 1`.
One tool alone, to see what a change does (nothing is kept): `python -m benchmarks.engine --tool finetune --rows 100`.
Only the settings: `python -m benchmarks.engine --candidates`, of one tool with `--tool`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import replace

from benchmarks.engine import data, rounds, runs, table
from benchmarks.engine.tools import TOOLS


def one(chosen: argparse.Namespace) -> int:
    """One tool on some of the rows; prints its figures."""
    work, tool = runs.prepare_work(chosen.rows or data.ROWS), TOOLS[chosen.tool]
    job = runs.job(work, tool, nf4=chosen.nf4, seed=chosen.seed, threads=chosen.threads)
    settings = tool.candidates[chosen.setting] if chosen.setting else tool.settings
    row = runs.run(tool, job, work, settings)
    print(json.dumps(row, indent=1))
    return int("failed" in row)


def written(results: rounds.Results) -> int:
    """Write and print the page; 1 where something failed or a floor does not hold."""
    page = table.markdown(results.found)
    results.path.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    return int(any("failed" in run for run in results.found["runs"]) or any(floor.holds is False for floor in table.floors(results.found)))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of every run; each tool's own choice without")
    parser.add_argument("--variant", choices=[variant.name for variant in rounds.VARIANTS], help="only this one")
    parser.add_argument("--candidates", action="store_true", help="only try the settings of the peers, or of --tool")
    parser.add_argument("--table", action="store_true", help="only write and print the page again")
    parser.add_argument("--tool", choices=TOOLS, help="one run of this tool; with --candidates: only its settings")
    parser.add_argument("--setting", help="one of the tool's candidates")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the tool that runs is ended too
    if chosen.table:
        return written(rounds.Results())
    if chosen.tool and not chosen.candidates:
        return one(chosen)
    variants = [variant for variant in rounds.VARIANTS if chosen.variant in (None, variant.name)]
    results = rounds.Results()
    if chosen.rows:
        variants = [replace(variant, rows=min(variant.rows, chosen.rows)) for variant in variants]
        results = rounds.Results(runs.WORK / f"engine-{chosen.rows}.json")
    else:
        rounds.candidates(results, [TOOLS[chosen.tool]] if chosen.tool else rounds.PEERS, chosen.threads)
    return written(results if chosen.candidates else rounds.compare(results, chosen.rounds, chosen.threads, variants))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
