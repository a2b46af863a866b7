"""Commands whose lanes are forked processes: the same run as by threads, and none of them left, whatever ends it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from finetune import api
from finetune.sealed import verify
from tests.outcome import result, rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="lanes are forked on Linux alone")

STEPS = 100
TRAIN = {
    "epochs": STEPS,
    "max_steps": STEPS,
    "batch_size": 8,
    "precision": "fp32",
    "tokens_per_device": 1024,
    "evaluate": {"every_steps": 40},
    "checkpoint": {"every_steps": 20, "keep": 2},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Callable[[str], Path]:
    """(name of the run) -> its configuration: steps of some 800 tokens, two lanes. The run lies beside it."""
    folder = tmp_path_factory.mktemp("forks")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Which title has the disease that has another name? " + "Please. " * (number % 5)},
                {"role": "assistant", "content": f"Title {number} " + "of it " * (3 + number % 7)},
            ]
        }
        for number in range(20)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str) -> Path:
        settings = {
            "model": {"id": str(tiny_model_dir)},
            "tuning": {"method": "lora", "rank": 4},
            "optimizer": {"learning_rate": 0.001},
            "data": {"train": [{"source": str(folder / "chat.jsonl")}], "validation": {"fraction": 0.2}, "max_tokens": 256},
            "train": TRAIN,
            "output": str(folder / name),
        }
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(settings))
        return path

    return write


@pytest.fixture(scope="module")
def by_threads(config: Callable[[str], Path]) -> Iterator[Path]:
    """The run that a script makes which calls the library, as this process does."""
    before, seen = torch.get_num_threads(), set[int]()
    torch.set_num_threads(2)
    yield api.train(api.load_config(config("threads"), []).config, lambda _: seen.add(len(multiprocessing.active_children()))).path
    torch.set_num_threads(before)
    assert seen == {0}


class Command:
    """A command that trains in a process group of its own, as a shell starts it."""

    def __init__(self, config: Path, *options: str, steps: int = 10) -> None:
        """Returns when it has done so many ``steps``."""
        self._figures = config.with_suffix("") / "metrics.jsonl"
        begun = self._done()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetune", "train", str(config), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while self._done() < begun + steps:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "it took too long"
            time.sleep(0.005)
        whole = psutil.Process(self.process.pid)
        (self.fork,) = whole.children()
        """What computes the second lane."""
        assert self.fork.cmdline() == whole.cmdline()

    def _done(self) -> int:
        return self._figures.read_bytes().count(b'"kind": "step"') if self._figures.exists() else 0

    def signal_all(self, number: int) -> None:
        """As Ctrl-C does, or a service manager that stops the command."""
        os.killpg(self.process.pid, number)

    def ended(self) -> tuple[int, str]:
        """Its exit code and what it said on stderr; seconds later no process of its group is left, nor one that has its streams."""
        code = self.process.wait(timeout=60)  # what it says fits in the pipe
        deadline = time.monotonic() + 5
        while any(self._in_group(each) for each in psutil.process_iter()):
            assert time.monotonic() < deadline, "a process is left"
            time.sleep(0.05)
        return code, self.process.communicate(timeout=5)[1]

    def _in_group(self, each: psutil.Process) -> bool:
        try:
            return os.getpgid(each.pid) == self.process.pid and each.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ProcessLookupError):
            return False


@pytest.mark.slow
@pytest.mark.xdist_group("forks")
def test_forks_train_as_threads_do_bit_for_bit(config: Callable[[str], Path], by_threads: Path) -> None:
    path = config("forks")
    code, err = Command(path).ended()
    run = path.with_suffix("")
    assert code == 0, err
    assert rows(run) == rows(by_threads)
    assert result(run) == result(by_threads)
    measured = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["input_seconds"] <= row["seconds"] for row in measured if row["kind"] == "step")


@pytest.mark.slow
@pytest.mark.xdist_group("forks")
def test_whatever_ends_a_run_no_fork_is_left_and_it_resumes_to_the_same(config: Callable[[str], Path], by_threads: Path) -> None:
    """Ctrl-C, a request to stop, the death of the fork and that of the command, one after the other, and then to the end."""
    path = config("stopped")
    run = path.with_suffix("")
    options: list[str] = []
    for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        command = Command(path, *options)
        command.signal_all(number)
        code, err = command.ended()
        assert (code, "Traceback" in err, "--resume" in err) == (expected, False, True), err
        newest = max((run / "checkpoints").iterdir())
        verify(newest)
        assert rows(run)[-1]["step"] == int(newest.name.removeprefix("step-"))
        options = ["--resume"]

    command = Command(path, *options)
    command.fork.kill()
    code, err = command.ended()
    assert (code, "Traceback" in err) == (4, False), err
    assert "a process that computes a part of each step has died" in err
    assert "where: training" in err
    assert "fix:" in err

    for signals in ((signal.SIGKILL,), (signal.SIGINT, signal.SIGINT)):  # also where it computes for long, or hangs
        command = Command(path, *options)
        command.fork.suspend()
        time.sleep(0.3)  # a step waits for it by now
        for number in signals:
            command.process.send_signal(number)
            time.sleep(0.2)
        with suppress(ProcessLookupError):  # the kernel wakes what is stopped in a group that nobody leads any more
            os.kill(command.fork.pid, signal.SIGCONT)
        code, err = command.ended()
        assert code == (-signal.SIGKILL if len(signals) == 1 else 130), err
    assert not (run / "adapter").exists()

    code, err = Command(path, *options).ended()
    assert code == 0, err
    assert rows(run) == rows(by_threads)
    assert result(run) == result(by_threads)
