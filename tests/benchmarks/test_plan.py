"""`make bench-plan`, as far as it can be seen without running SmolLM2 eight times or having a GPU."""

from __future__ import annotations

import math
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch

from benchmarks import plan, plan_gpu
from finetune.planning.memory import Memory


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


def peaks(*own: int) -> list[plan.Peak]:
    return [plan.Peak(size * 2**20, 2 * size * 2**20) for size in own]


def test_the_median_of_own_memory_is_compared_and_the_page_shows_the_rest() -> None:
    foretold = Memory({"base": 70 * 2**20, "process": 130 * 2**20}, pages=90 * 2**20)
    row = plan.row_of(plan.cases()[0], 2, foretold, peaks(100, 90, 200))
    assert row["predicted"] == 110 * 2**20
    assert row["error"] == pytest.approx(0.1)
    better = plan.row_of(plan.cases()[1], 2, foretold, peaks(110, 110, 110))
    page = plan.markdown({"cpu": [better, row]})
    assert "checkpointing off, 1024 tokens | 110 | 100 | 90 to 200 | +10.0% | 200 | 200 |" in page
    assert "3 processes for each run, 2 threads" in page
    assert "Largest error 10.0%; the bar is 10%. The largest of a single process: 45.0%." in page
    assert "Not measured." in page
    assert "Largest error 8.0%" in plan.markdown({"gpu": [{"case": "a", "predicted": 92, "measured": 100, "error": -0.08}]})


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells of pages")
def test_own_memory_is_what_a_process_wrote_and_not_what_it_mapped(tmp_path: Path) -> None:
    """64 MiB written, and 128 of a file that are read."""
    (tmp_path / "file").write_bytes(bytes(2**27))
    code = f"""
import mmap, time
own = mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE)
own.write(b"x" * 2**25)
own.write(b"x" * 2**25)
file = open({str(tmp_path / "file")!r}, "rb")
pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(pages[place] for place in range(0, 2**27, 4096))
time.sleep(0.5)
"""
    status, peak = plan.watch([sys.executable, "-c", code], {}, tmp_path / "log")
    assert status == 0
    assert 2**26 <= peak.own < 2**26 + 2**26
    assert peak.resident > 2**26 + 2**27
    assert plan.watch([sys.executable, "-c", "raise SystemExit(3)"], {}, tmp_path / "log")[0] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_part_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", "--gpu"])
    assert plan.main() == 4
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_the_gpu_part_computes_on_small_shapes() -> None:
    for case in plan_gpu.gpu_cases(tiny=True)[:2]:
        found = plan_gpu.run_gpu(case, "cpu")
        assert found["losses"][0] == pytest.approx(math.log(512), abs=0.5)  # random weights know nothing
        assert found["losses"][1] < found["losses"][0]
        assert found["predicted"] == sum(found["parts"].values())
