"""What `finetune sweep` ends with when runs have no figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import api
from finetune.config.figure_names import VALIDATION_LOSS
from finetune.sweeping.table import Row, Shown, Table


def _row(name: str, failure: str | None, code: int) -> Row:
    figures = {} if failure else {VALIDATION_LOSS: Shown(1.0, None, None, None, "lower")}
    return Row(name, name, {}, f"sweep/{name}", failure, figures, 10, 1.0, code)


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((0, 5), 5), ((4, 5), 4), ((-9, 5), 1)])
@pytest.mark.parametrize("as_json", [False, True])
def test_the_exit_code_is_that_of_the_first_run_without_figures(
    monkeypatch: pytest.MonkeyPatch,
    write_config: Callable[..., Path],
    tmp_path: Path,
    call: Callable[..., Any],
    codes: tuple[int, ...],
    expected: int,
    as_json: bool,
) -> None:
    write_config()
    (tmp_path / "sweep.yaml").write_text(json.dumps({"config": "run.yaml", "output": "sweep", "arms": {"a": {}, "b": {"seed": 7}}}))
    rows = tuple(_row(name, "training: it did not end well" if code else None, code) for name, code in zip("ab", codes, strict=True))
    monkeypatch.setattr(api, "sweep", lambda _planned, _tell: (Table(VALIDATION_LOSS, (), rows), None))
    done = call("sweep", str(tmp_path / "sweep.yaml"), *(["--json"] if as_json else []))
    assert done.code == expected
    failed = sum(code != 0 for code in codes)
    assert (f"{failed} of 2 runs have no figures" in " ".join(done.err.split())) == (failed > 0)
    assert (len(json.loads(done.out)["rows"]) == 2) if as_json else done.out.endswith("sweep\n")


def test_a_misspelt_figure_is_told_before_anything_is_trained(
    write_config: Callable[..., Path], tmp_path: Path, finetune: Callable[..., Any]
) -> None:
    write_config()
    path = tmp_path / "sweep.yaml"
    path.write_text("config: run.yaml\noutput: sweep\nselect: validaton loss\ncolumns: [general text]\n")
    done = finetune("sweep", path, cwd=tmp_path)
    assert done.code == 2
    assert "no figure called 'validaton loss'" in done.err
    assert "did you mean 'validation loss'?" in done.err
    assert "did you mean 'general text: loss'?" in done.err
    assert "sweep.yaml:3:9" in done.err
    assert not (tmp_path / "sweep").exists()


def test_what_is_wrong_with_the_file_is_told_in_our_words(tmp_path: Path, finetune: Callable[..., Any]) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "config: 3\noutput: ''\narms: [a]\ngrid: {seed: [], train.epochs: 3}\nevaluate: maybe\ncolumns: general text\nselect:\nmore: 1\n"
    )
    done = finetune("sweep", path, "--list", cwd=tmp_path)
    assert done.code == 2
    assert done.out == ""
    assert [line.removeprefix("error: ") for line in done.err.splitlines() if line.startswith("error: ")] == [
        "`config` is 3; allowed: text that is not empty",
        "`output` is empty; allowed: text that is not empty",
        "`arms` is a list; allowed: a mapping, each value a mapping, each value any value",
        "`grid.seed` is an empty list; allowed: a list with at least one entry",
        '`grid."train.epochs"` is 3; allowed: a list, each entry any value',
        '`evaluate` is the text "maybe"; allowed: true or false',
        '`columns` is the text "general text"; allowed: a list, each entry text',
        "`select` is null; allowed: text that is not empty",
        "unknown key `more`",
    ]
