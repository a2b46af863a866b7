"""`finetune sweep` as a user runs it: stopped, gone on with, and its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def test_a_sweep_that_was_stopped_goes_on_and_ends_with_a_table(
    write_config: Callable[..., Path], finetune: Callable[..., object], tmp_path: Path
) -> None:
    write_config(train={"epochs": 200, "batch_size": 8, "precision": "fp32", "tokens_per_device": 256, "max_steps": 200})
    sweep = {
        "config": "run.yaml",
        "output": "sweep",
        "evaluate": False,
        "arms": {"long": {}, "short": {"train.max_steps": 2}},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    listed = finetune("sweep", "sweep.yaml", "--list", cwd=tmp_path)
    assert listed.out.splitlines() == ["sweep/long", "sweep/short  -o train.max_steps=2"]
    listed = finetune("sweep", "sweep.yaml", "--list", "--json", cwd=tmp_path)
    assert [run["settings"] for run in json.loads(listed.out)["runs"]] == [{}, {"train.max_steps": 2}]
    assert not (tmp_path / "sweep").exists()

    line = [sys.executable, "-m", "finetune", "sweep", "sweep.yaml"]
    began = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    metrics = tmp_path / "sweep" / "long" / "metrics.jsonl"
    while began.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.005)
    began.send_signal(signal.SIGTERM)
    _, err = began.communicate(timeout=120)
    assert began.returncode == 143, err
    assert "stopped at run 1 of 2, long" in err
    assert "run the same command again" in err
    steps = [json.loads(row)["step"] for row in metrics.read_text().splitlines()]
    assert 0 < steps[-1] < 200

    config = json.loads((tmp_path / "sweep.yaml").read_text())
    done = finetune("sweep", "sweep.yaml", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out == "sweep\n"
    assert "run 2 of 2, short: training" in done.err
    assert "the best of its arm by validation loss" in done.err
    table = json.loads((tmp_path / config["output"] / "sweep.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["long", "short"]
    assert [json.loads(row)["step"] for row in metrics.read_text().splitlines()][-1] == 200
    assert (tmp_path / "sweep" / "report.html").is_file()
    again = finetune("sweep", "sweep.yaml", "--json", cwd=tmp_path)
    assert again.code == 0
    assert json.loads(again.out)["rows"][1]["best"] is True
    assert "run 1 of 2, long: done already" in again.err
