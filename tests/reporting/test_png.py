"""Curves as pictures, and what is said where matplotlib is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from finetune.errors import ConfigError, HardwareError
from finetune.reporting.png import DPI, HEIGHT, WIDTH, require_png, write_png
from finetune.runs import RunDirectory

Make = Callable[..., RunDirectory]


def test_each_chart_is_a_picture(make_run: Make, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = write_png([make_run("_private $x$"), make_run("other", steps=4)], tmp_path / "pictures")
    assert [path.stem for path in paths] == ["loss", "learning-rate", "gradient-norm", "throughput", "memory", "input"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size == (round(WIDTH * DPI), round(HEIGHT * DPI))
            colours = picture.convert("RGB").getcolors(1 << 24)
            assert colours
            shades = {shade for _, shade in colours}
            assert (31, 119, 180) in shades  # the line of the first run
            assert (255, 127, 14) in shades  # and of the second


def test_a_missing_matplotlib_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(HardwareError, match=r"pip install 'finetune\[png\]'"):
        require_png(tmp_path)


def test_a_directory_that_the_system_refuses_is_an_error(make_run: Make) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(HardwareError) as caught:
        write_png([make_run()], Path("/proc/pictures"))
    assert caught.value.exit_code == 4
    assert caught.value.problems[0].where == "/proc/pictures"


def test_a_place_where_no_directory_can_be_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "missing" / "pictures"):
        with pytest.raises(ConfigError, match="--png"):
            require_png(path)
