"""Ten times the rows take no more memory: the run's own validation rows, and rows of the task's own."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.data.examples import Examples
from finetune.data.render import Example
from finetune.data.stored import save_rows
from finetune.runs import open_run
from finetune.sealed import sha256_of

FEW, MANY = 1_000, 10_000
BAR = 1.1

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the kernel's figures from /proc")


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[list[str]]], list[tuple[float, float]]]:
    """commands -> of each (MiB at its peak, MiB of its own pages at theirs)."""
    folder = tmp_path_factory.mktemp("eval")

    def measure(commands: list[list[str]]) -> list[tuple[float, float]]:
        lines = "".join(json.dumps(command) + "\n" for command in commands)
        program, root = [sys.executable, "-m", "tests.evaluation.peaks"], Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": str(root)}
        done = subprocess.run(program, cwd=folder, input=lines, capture_output=True, text=True, timeout=300, check=False, env=environment)
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert [code for code, *_ in found] == [0] * len(commands), done.stderr
        return [(resident, own) for _, resident, own in found]

    return measure


@pytest.fixture(scope="module")
def small(make_tiny_model: Callable[..., Path]) -> Path:
    """So small that rows, not products, are what is done."""
    return make_tiny_model(hidden_size=16, intermediate_size=32, num_attention_heads=1, num_key_value_heads=1)


@pytest.fixture
def trained(small: Path, write_config: Callable[..., Path], train_here: Callable[..., Path]) -> Path:
    """A run that validates in few and large batches."""
    tuning = {"method": "lora", "rank": 2, "targets": ["q_proj"]}
    settings = {"epochs": 1, "batch_size": 8, "precision": "fp32", "tokens_per_device": 8192}
    return train_here(write_config(model={"id": str(small)}, tuning=tuning, train=settings))


def with_rows(trained: Path, count: int) -> Path:
    """The run ``trained`` with ``count`` validation rows of 48 to 96 tokens instead of its own."""
    run = open_run(shutil.copytree(trained, trained.with_name(f"run{count}")))
    drawn = random.Random(count)
    rows = []
    for number in range(count):
        length = 48 + number % 49
        ids = tuple(drawn.choices(range(257, 320), k=length))  # numbers that Python does not keep at hand, as most ids of real vocabularies
        rows.append(Example(ids, (False, *(True for _ in ids[1:])), "row"))
    save_rows(run.rows, Examples.of([]), Examples.of(rows))
    records = json.loads(run.environment.read_text())
    run.environment.write_text(json.dumps(records | {"rows_sha256": sha256_of(run.rows)}))
    return run.path


def with_file(folder: Path, count: int) -> Path:
    """A configuration that measures the loss of ``count`` rows."""
    texts = ({"text": "Doctors call it by another name. " * (1 + number % 3) + str(number)} for number in range(count))
    (folder / f"{count}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    path = folder / f"{count}.yaml"
    path.write_text(f"evaluation: {{tokens_per_device: 8192, tasks: [{{task: loss, data: {{source: {count}.jsonl}}}}]}}\n")
    return path


@pytest.mark.slow
def test_b5_ten_times_the_rows_take_no_more_memory(
    peaks: Callable[[list[list[str]]], list[tuple[float, float]]], small: Path, trained: Path, tmp_path: Path
) -> None:
    """Resident memory within 10 %, and what is the process's own too."""
    runs = [["eval", str(with_rows(trained, count)), "-o", "evaluation.tasks=[{task: loss}]"] for count in (FEW, MANY)]
    files = [["eval", str(small), "--config", str(with_file(tmp_path, count))] for count in (FEW, MANY)]
    found = peaks([*runs, *files])
    for what, few, many in (("validation rows", *found[:2]), ("rows of a file", *found[2:])):
        assert many[0] < BAR * few[0], (what, "MiB resident", few, many)
        assert many[1] < BAR * few[1], (what, "MiB of its own", few, many)
    figures = json.loads((tmp_path / f"run{MANY}" / "eval" / "results.json").read_text())["figures"]
    assert figures[0]["n"] == MANY
