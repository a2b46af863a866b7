"""docs/quickstart.svg: the quickstart's last screen, as a picture of what `finetune report RUN` really printed.

python docs/picture.py runs/quickstart
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from finetune import api
from finetune.cli import view

# rich's own template fetches a font from the network; this one takes what the reader has
FORMAT = """<svg viewBox="0 0 {terminal_width} {terminal_height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
<rect x="-16" y="-12" width="100%" height="100%" rx="8" fill="#1b1f24"/>
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g>
</svg>
"""


def main(run: Path) -> None:
    """Draw the last evaluation of ``run``."""
    results = api.stored_results(run)
    if results is None:
        sys.exit(f"{run} was not evaluated: run `finetune eval {run}` first")
    console = Console(record=True, width=100, file=Path("/dev/null").open("w"), force_terminal=True, highlight=False)  # noqa: SIM115
    view.out = console
    view.show_results(results)
    places = {**api.places(run), "report": run / "report.html"}
    view.show_places({name: os.path.relpath(path) for name, path in places.items()})
    svg = console.export_svg(title="finetune report", theme=MONOKAI, code_format=FORMAT, unique_id="q")
    (Path(__file__).parent / "quickstart.svg").write_text(re.sub(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', _with_margin, svg, count=1))


def _with_margin(found: re.Match[str]) -> str:
    return f'viewBox="-16 -12 {float(found[1]) + 32:g} {float(found[2]) + 24:g}"'


if __name__ == "__main__":
    main(Path(sys.argv[1]))
