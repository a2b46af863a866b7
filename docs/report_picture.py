"""docs/report.png: the page of a run as Chromium shows it, on a wide screen in light colours and on a phone in dark ones.

python docs/report_picture.py runs/quickstart
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from finetune import api
from tests.reporting.browser import browser

HEIGHT, PHONE = 1500, 390


def main(run: Path) -> None:
    """Write the picture of the page of ``run``."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, browser(folder := Path(name)) as page:
        written = api.report(run, page=folder / "report.html")
        page.show(written)
        page.picture(folder / "wide.png", HEIGHT)
        page.show(written, PHONE, dark=True)
        page.picture(folder / "phone.png", HEIGHT)
        wide, phone = Image.open(folder / "wide.png"), Image.open(folder / "phone.png")
        phone = phone.resize((PHONE, HEIGHT))
        both = Image.new("RGB", (wide.width + phone.width, HEIGHT), "white")
        both.paste(wide, (0, 0))
        both.paste(phone, (wide.width, 0))
        both.quantize(256).save(Path(__file__).with_name("report.png"), optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
