"""The evidence: `make evidence`, or `python -m benchmarks.evidence [--scale gpu]` where the environment is there.

Trains and measures every run of benchmarks/evidence/SCALE.yaml that is not done yet (`finetune sweep`), copies what was measured into
docs/evidence/runs/SCALE, and writes docs/evidence/README.md (gpu.md) and its plot from those files. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.evidence import page, records
from finetune import api
from finetune.config.sweep import Case, Planned
from finetune.errors import FinetuneError

ROOT = Path(__file__).parents[2]
SCALES = ("cpu", "gpu")


def write(planned: Planned, docs: Path, scale: str) -> Path:
    """Write the page and the plot of ``planned``, from the files of its runs below ``docs``; returns the path of the page."""
    runs = records.read(planned, docs / "runs" / scale)
    docs.mkdir(parents=True, exist_ok=True)
    image, text = docs / page.plot_name(scale), docs / ("README.md" if scale == SCALES[0] else f"{scale}.md")
    image.unlink(missing_ok=True)
    if page.has_plot(runs):
        image.write_text(page.plot(runs), encoding="utf-8")
    text.write_text(page.readme(runs, planned.cases[0][1].config, scale), encoding="utf-8")
    return text


def told(number: int, of: int, case: Case, doing: str) -> None:
    """Where the sweep stands, on stderr."""
    print(f"run {number} of {of}, {case.run.name}: {doing}", file=sys.stderr, flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--page", action="store_true", help="train nothing: only write the page of the runs that there are")
    parser.add_argument("--sweep", type=Path, help="another sweep file, to try something; needs --docs")
    parser.add_argument("--docs", type=Path, help="another directory for the page and the runs' files")
    chosen = parser.parse_args()
    if chosen.sweep and not chosen.docs:
        parser.error("--sweep needs --docs: the page in docs/evidence is that of its own sweep")
    docs = chosen.docs or ROOT / "docs" / "evidence"
    try:
        planned = api.load_sweep(chosen.sweep or Path(__file__).parent / f"{chosen.scale}.yaml")
    except FinetuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    failures: dict[str, str | None] = {}
    code = 0
    try:
        if not chosen.page:
            table, _ = api.sweep(planned, told)
            failures = {row.name: row.failure for row in table.rows}
    except FinetuneError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    records.copy(planned, failures, docs / "runs" / chosen.scale)  # of a sweep that was stopped, what there is
    print(write(planned, docs, chosen.scale))
    return code or int(any(failures.values()))


if __name__ == "__main__":
    sys.exit(main())
