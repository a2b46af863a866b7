"""How tools are run, watched and read."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.engine import measure, rounds, runs
from benchmarks.engine.measure import Line
from benchmarks.engine.tools import FINETUNE, PLAIN, TOOLS, TRL_SFT, Job, Step, variables

_HOLD = "import time; held = bytearray(b'x') * 200_000_000; [sum(range(1000)) for _ in range(20_000)]; print('done')"
_PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_HOLD!r}], check=True)"


def _measured(code: str, directory: Path, timeout_s: float = 60, watched: Path | None = None) -> measure.Measured:
    return measure.run([sys.executable, "-c", code], os.environ, directory, timeout_s, watched)


def test_memory_and_processor_time_of_children_count(tmp_path: Path) -> None:
    found = _measured(_PARENT, tmp_path)
    assert found.returncode == 0
    assert found.peak_mib > 190
    assert found.cpu_s > 0.05
    assert [line.text for line in found.lines] == ["done"]
    assert 0 < found.lines[0].at_s <= found.wall_s


def test_a_command_that_outlasts_its_time_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    found = _measured(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", tmp_path, timeout_s=8)
    assert found.returncode == -9
    with suppress(psutil.NoSuchProcess):  # gone, or soon a zombie that nobody has collected yet
        killed = psutil.Process(int(found.lines[0].text))
        while killed.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)


def test_lines_of_a_watched_file_are_seen_as_they_come(tmp_path: Path) -> None:
    file = tmp_path / "metrics"
    code = f"import time\nfor n in range(3):\n    open({str(file)!r}, 'a').write(f'{{n}}\\n'); time.sleep(0.3)"
    found = _measured(code, tmp_path, watched=file)
    assert [line.text for line in found.lines] == ["0", "1", "2"]
    assert found.lines[2].at_s - found.lines[0].at_s > 0.3


def test_logs_are_read_as_steps() -> None:
    own = [Line(1.0, 0.5, '{"kind": "step", "tokens": 7, "loss": 2.0}'), Line(2.0, 0.7, '{"kind": "evaluation"}')]
    assert FINETUNE.read(own) == [Step(1.0, 0.5, 7, 2.0)]
    assert PLAIN.read([Line(1.0, 0.5, "loading"), Line(2.0, 1.0, '{"step": 1, "loss": 3.0, "tokens": 9}')]) == [Step(2.0, 1.0, 9, 3.0)]
    printed = ["{'loss': '2.5', 'num_tokens': '10'}", "{'loss': '2.0', 'num_tokens': '25.0'}", "{'train_runtime': '3', 'num_tokens': '25'}"]
    found = TRL_SFT.read([Line(float(n), float(n), text) for n, text in enumerate(printed)])
    assert [(step.tokens, step.loss) for step in found] == [(10, 2.5), (15, 2.0)]


def test_steady_state_leaves_out_the_first_tenth() -> None:
    steps = [Step(100.0 + number, 10.0 + 2 * number, 50, 1.0) for number in range(20)]
    steps[0] = Step(10.0, 0.0, 50, 1.0)
    assert runs.steady(steps) == (50.0, 25.0)
    with pytest.raises(ValueError, match="too few"):
        runs.steady(steps[:1])


def test_a_run_that_did_not_do_all_the_work_has_no_figures() -> None:
    measured = measure.Measured(0, 10.0, 5.0, 1.0, 0.0, (), "")
    steps = [Step(1.0, 1.0, 50, 1.0), Step(2.0, 2.0, 50, 1.0)]
    assert runs.figures(measured, steps, {"tokens": 100, "supervised_tokens": 40, "rows": 2})["supervised_tokens_per_s"] == 4.0
    with pytest.raises(ValueError, match="100 tokens, the rows have 101"):
        runs.figures(measured, steps, {"tokens": 101, "supervised_tokens": 40, "rows": 2})


def test_a_failure_says_what_the_tool_said(tmp_path: Path) -> None:
    tool = TOOLS["transformers+PEFT"]
    work: Any = None  # a run that fails comes to no figures
    found = runs.run(tool, _job(tmp_path), work, ["--no-such-option"])
    assert found["failed"] == "exit code 2"
    assert any("unrecognized arguments: --no-such-option" in line for line in found["said"])
    assert not (tmp_path / "run").exists()


def _job(directory: Path) -> Job:
    return Job(directory / "model", directory / "rows.jsonl", directory / "template", directory / "run")


def test_every_tool_is_told_the_same_numbers(tmp_path: Path) -> None:
    for name, tool in TOOLS.items():
        place = tmp_path / name
        place.mkdir()
        job = Job(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "template", place, seed=5)
        words = " ".join(map(str, tool.command(job, tool.settings)))
        words += (place / "config.yaml").read_text() if tool is FINETUNE else ""
        for number in ("16", "32", "0.0002", "cosine", "5"):
            assert number in words or (tool is PLAIN and number == "cosine")


def test_the_callers_settings_of_threads_reach_no_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert not {name for name in _job(tmp_path).environment() if name.startswith("OMP")}


def test_every_tool_begins_a_round_in_turn() -> None:
    lora, alone, _ = rounds.VARIANTS
    assert [lora.tools(number)[0] for number in range(4)] == [FINETUNE, PLAIN, TRL_SFT, FINETUNE]
    assert all(sorted(tool.name for tool in lora.tools(number)) == sorted(TOOLS) for number in range(3))
    assert [alone.tools(number) for number in range(2)] == [[FINETUNE], [FINETUNE]]


def test_results_are_kept_continued_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    key = {"round": 0, "variant": "LoRA", "tool": "TRL", "of": {"source": "a"}}
    rounds.Results(path).add("runs", key, {"wall_s": 1.0})
    again = rounds.Results(path)
    assert again.has("runs", key)
    assert not again.has("runs", key | {"of": {"source": "b"}})
    again.add("runs", key | {"of": {"source": "b"}}, {"failed": "no memory"})
    assert not again.has("runs", key | {"of": {"source": "b"}})  # a failure is tried again
    assert [row.get("failed") for row in rounds.Results(path).found["runs"]] == ["no memory"]


def test_settings_are_variables_and_options() -> None:
    assert variables(("OMP_NUM_THREADS=2", "--dtype", "a=b")) == ({"OMP_NUM_THREADS": "2"}, ["--dtype", "a=b"])
    assert any(setting.startswith("OMP_NUM_THREADS=") for setting in TRL_SFT.settings)  # its launcher would take one thread


def test_a_peer_runs_at_its_fastest_candidate(tmp_path: Path) -> None:
    results = rounds.Results(tmp_path / "engine.json")
    assert rounds.chosen(results, PLAIN) == list(PLAIN.settings)
    for name, speed in (("a", 10.0), ("b", 30.0), ("c", 20.0)):
        key = {"tool": PLAIN.name, "setting": name, "of": {}}
        results.add("candidates", key, {"settings": [f"--{name}"], "steady_tokens_per_s": speed})
    results.add("candidates", {"tool": PLAIN.name, "setting": "d", "of": {}}, {"settings": ["--d"], "failed": "no memory"})
    results.add("candidates", {"tool": TRL_SFT.name, "setting": "e", "of": {}}, {"settings": ["--e"], "steady_tokens_per_s": 99.0})
    assert rounds.chosen(results, PLAIN) == ["--b"]
