"""`make bench-plan`, as far as it can be seen without running SmolLM2 eight times or having a GPU."""

from __future__ import annotations

import math
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch

from benchmarks import plan


def test_every_pair_of_settings_is_measured_equally_often() -> None:
    rows = [(case.base, case.rank, case.checkpointing, case.tokens) for case in plan.cases()]
    assert len(set(rows)) == len(rows) == 8
    for first, second in combinations(range(4), 2):
        assert set(Counter((row[first], row[second]) for row in rows).values()) == {2}


def test_micro_batches_are_full_and_there_are_rows_for_every_step(tmp_path: Path) -> None:
    for case in plan.cases():
        train = case.config(tmp_path, tmp_path)["train"]
        assert train["batch_size"] * plan.ROW_TOKENS[case.tokens] == plan.MICRO_BATCHES * case.tokens
    text = plan.write_rows(tmp_path / "rows.jsonl", 1000).read_text()
    assert len(text.split()) >= 1000


def test_the_page_shows_the_largest_error() -> None:
    rows = [{"case": name, "predicted": 110, "measured": 100, "error": error} for name, error in (("a", 0.01), ("b", -0.08))]
    page = plan.markdown({"cpu": rows})
    assert "Largest error 8.0%" in page
    assert "Not measured." in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_part_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", "--gpu"])
    assert plan.main() == 4
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_the_gpu_part_computes_on_small_shapes() -> None:
    for case in plan.gpu_cases(tiny=True)[:2]:
        found = plan.run_gpu(case, "cpu")
        assert found["losses"][0] == pytest.approx(math.log(512), abs=0.5)  # random weights know nothing
        assert found["losses"][1] < found["losses"][0]
        assert found["predicted"] == sum(found["parts"].values())
