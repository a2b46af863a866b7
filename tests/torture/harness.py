"""Kill a run with SIGKILL at every file-system call of a checkpoint and at random times, resume it, compare it with one that lived.

    python tests/torture/harness.py OUT.json [--calls all|8] [--main-calls all|8] [--random 60] [--seed 0]

The libraries are imported once; each run is a fork of this process that does what `finetune train` does. A run is killed before its k-th
call, k from 1 on: calls are those that Python's audit hooks see (open, rename, mkdir, remove, rmdir), fsync, the exchange of two names,
and each tensor file, which is also cut in half. What the checkpoint thread does and what the main thread does are counted apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # a process with threads cannot be forked safely
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}

AUDITED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}
MOST_RESUMPTIONS = 4
MEASURED = {"seconds", "input_seconds", "memory_bytes"}
"""Of a row: differs from run to run."""


@dataclass
class Point:
    """Where a run was killed, and what became of it."""

    kind: str
    """`checkpoint thread`, `main thread` or `random time`."""
    at: str
    """The call, or the seconds after the start."""
    killed: int = 0
    """How often."""
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)
    """What is not as in the run that lived; empty: nothing."""


class Killer:
    """Counts the calls of one thread in a forked run, and ends the process before the k-th."""

    def __init__(self, thread: str, k: int, log: Path | None) -> None:
        self.thread, self.k, self.log, self.count = thread, k, log, 0

    def call(self, name: str, path: str) -> None:
        """Before the call ``name``."""
        if self._is_here():
            self.count += 1
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(f"{name} {path}\n")
            if self.count == self.k:
                os.kill(os.getpid(), signal.SIGKILL)

    def is_due(self) -> bool:
        """Whether the next call is the last."""
        return self._is_here() and self.count + 1 == self.k

    def _is_here(self) -> bool:
        main = threading.current_thread() is threading.main_thread()
        return main == (self.thread == "main thread")


class Eyes:
    """Shows a killer every call of this process that changes something below a run directory, but none of its own."""

    def __init__(self, killer: Killer, run: Path) -> None:
        self._killer, self._run, self._busy = killer, str(run), threading.local()

    def install(self) -> None:
        from finetune import sealed
        from finetune.training import checkpoints

        os.fsync = self._watched(os.fsync)
        sealed._exchange = self._watched(sealed._exchange)
        checkpoints.save_file = self._torn(checkpoints.save_file)
        sys.addaudithook(self._audit)

    def _see(self, name: str, path: object = "") -> None:
        if not getattr(self._busy, "flag", False):
            self._busy.flag = True
            try:
                self._killer.call(name, str(path).replace(self._run, "RUN"))
            finally:
                self._busy.flag = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in AUDITED or (event == "open" and not writes(arguments[2])):
            return
        # what rmtree removes is named relative to a directory that it holds open
        if self._run in str(arguments[0]) or (event in ("os.remove", "os.rmdir") and arguments[-1] != -1):
            self._see(event, arguments[0])

    def _watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            self._see(f"{real.__name__} begins")
            result = real(*arguments)
            self._see(f"{real.__name__} has ended")
            return result

        return wrapped

    def _torn(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(tensors: Any, path: Path, metadata: Any) -> None:
            self._see("save_file begins", path.name)
            if self._killer.is_due():
                real(tensors, path, metadata)
                os.truncate(path, path.stat().st_size // 2)
            self._see("save_file is cut in half", path.name)
            real(tensors, path, metadata)
            self._see("save_file has ended", path.name)

        return wrapped


def writes(flags: object) -> bool:
    """Whether a file opened with ``flags`` can be changed."""
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def fork(arguments: list[str], err: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start `finetune ARGUMENTS` in a fork; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for number, path in ((1, os.devnull), (2, str(err))):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["finetune", *arguments]
        before()
        from finetune.cli.app import main

        main()
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    finally:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def wait(pid: int) -> int:
    """Its exit code, negative after a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Torture:
    """Runs of one small configuration, and what each of them must come to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.environ["FINETUNE_CACHE"] = str(folder / "cache")
        self.reference = folder / "reference"
        self._make_inputs()
        if code := wait(fork(["train", str(self._config("reference"))], folder / "reference.err")):
            raise SystemExit(f"the reference run failed with {code}: {(folder / 'reference.err').read_text()[-2000:]}")
        self.wanted = self._result(self.reference)
        begun = time.monotonic()
        wait(fork(["train", str(self._config("again"))], folder / "again.err"))
        self.seconds = time.monotonic() - begun
        """Of a run whose data is prepared."""

    def _make_inputs(self) -> None:
        spec = importlib.util.spec_from_file_location("shared", Path(__file__).parents[1] / "conftest.py")
        assert spec is not None
        assert spec.loader is not None
        shared = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(shared)
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        model = self.folder / "model"
        shared.write_tokenizer(model)
        torch.manual_seed(0)
        sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
        made = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2))
        made.to(torch.bfloat16).save_pretrained(model)
        words = shared.TEXT.split()
        rows = [
            {"messages": [{"role": "user", "content": " ".join(words[: 2 + n % 9])}, {"role": "assistant", "content": f"Title {n}"}]}
            for n in range(24)
        ]
        (self.folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _config(self, name: str) -> Path:
        path = self.folder / f"{name}.yaml"
        settings = {
            "model": {"id": str(self.folder / "model")},
            "tuning": {"method": "lora", "rank": 8, "alpha": 8, "dropout": 0.2},
            "optimizer": {"learning_rate": 0.01, "method": "paged-adamw-8bit"},
            "data": {"train": [{"source": str(self.folder / "chat.jsonl")}], "validation": {"fraction": 0.2}, "max_tokens": 256},
            "train": {
                "epochs": 2,
                "batch_size": 4,
                "precision": "fp32",
                "tokens_per_device": 128,
                "checkpoint": {"every_steps": 2, "keep": 1},
                "evaluate": {"every_steps": 3},
            },
            "output": str(self.folder / name),
        }
        path.write_text(json.dumps(settings))
        return path

    def calls(self, thread: str) -> list[str]:
        """What ``thread`` does in a run that lives, call by call."""
        log = self.folder / f"{thread}.log"
        name = f"calls of the {thread}"
        run = self.folder / name
        code = wait(fork(["train", str(self._config(name))], self.folder / "calls.err", Eyes(Killer(thread, -1, log), run).install))
        assert code == 0, (self.folder / "calls.err").read_text()
        shutil.rmtree(run)
        return log.read_text().splitlines()

    def killed_at_call(self, number: int, thread: str, k: int, call: str) -> Point:
        name = f"call-{number}"
        point = Point(thread, f"{k}: {call}")
        pid = fork(
            ["train", str(self._config(name))], self.folder / f"{name}.err", Eyes(Killer(thread, k, None), self.folder / name).install
        )
        point.killed += wait(pid) == -signal.SIGKILL
        return self._resumed(name, point)

    def killed_at_random(self, number: int, draw: random.Random) -> Point:
        name = f"random-{number}"
        times = [draw.uniform(0, 1.05 * self.seconds) for _ in range(draw.choice((1, 1, 2)))]
        point = Point("random time", " and ".join(f"{seconds:.3f} s" for seconds in times))
        for seconds in times:
            pid = fork(self._again(name), self.folder / f"{name}.err")
            time.sleep(seconds)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            point.killed += wait(pid) == -signal.SIGKILL
        return self._resumed(name, point)

    def _again(self, name: str) -> list[str]:
        """What the user types now."""
        resume = ["--resume"] if (self.folder / name / "environment.json").exists() else []
        return ["train", str(self._config(name)), *resume]

    def _resumed(self, name: str, point: Point) -> Point:
        run, err, code = self.folder / name, self.folder / f"{name}.err", -1
        while code != 0 and point.resumed < MOST_RESUMPTIONS:
            point.resumed += 1
            code = wait(fork(self._again(name), err))
        if code != 0:
            point.wrong.append(f"exit code {code}: {err.read_text()[-500:]}")
        else:
            found = self._result(run)
            point.wrong = [f"{key}: {found[key]} instead of {wanted}" for key, wanted in self.wanted.items() if found[key] != wanted]
        shutil.rmtree(run, ignore_errors=True)
        return point

    def _result(self, run: Path) -> dict[str, Any]:
        """What must be equal: the adapter, bit by bit, the rows of metrics.jsonl but for times and memory, and which files there are."""
        from finetune.sealed import verify

        for manifest in run.rglob("MANIFEST.json"):
            verify(manifest.parent)
        hashes = json.loads((run / "adapter" / "MANIFEST.json").read_text())["sha256"]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {
            "adapter": hashes["adapter_model.safetensors"],
            "metrics": [{key: value for key, value in row.items() if key not in MEASURED} for row in rows],
            "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
        }


def chosen(calls: list[str], most: str) -> Iterator[tuple[int, str]]:
    """(k, call) of all calls, or of so many of them, evenly spread."""
    step = 1.0 if most == "all" else max(1.0, len(calls) / int(most))
    position = 0.0
    while round(position) < len(calls):
        yield round(position) + 1, calls[round(position)]
        position += step


def one_save(calls: list[str]) -> tuple[int, int]:
    """(first, last) position of the calls of the last save that replaced and rotated another."""
    begins: dict[str, int] = {}
    for number, call in enumerate(calls):
        if call.startswith("os.mkdir") and "checkpoints/.step" in call:
            begins.setdefault(call, number)
    return sorted(begins.values())[-2], sorted(begins.values())[-1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--random", type=int, default=60, help="runs killed at random times")
    parser.add_argument("--calls", default="all", help="how many calls of one checkpoint's write, `all` of them by default")
    parser.add_argument("--main-calls", default="all", help="the same of the main thread's calls in a whole run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from finetune.process import prepare

    prepare()
    import transformers.models.llama.modeling_llama  # noqa: F401

    import finetune.cli.app
    import finetune.reporting.html
    import finetune.training.launch
    import finetune.training.train  # noqa: F401

    folder, points, draw = Path(tempfile.mkdtemp(prefix="torture-")), [], random.Random(options.seed)
    try:
        torture = Torture(folder)
        counted = {}
        for thread, most in (("checkpoint thread", options.calls), ("main thread", options.main_calls)):
            calls = torture.calls(thread)
            counted[thread] = len(calls)
            first, last = one_save(calls) if thread == "checkpoint thread" else (0, len(calls))
            counted[f"{thread}, those killed before"] = last - first
            for k, call in chosen(calls[first:last], most):
                points.append(torture.killed_at_call(len(points), thread, first + k, call))
                progress(points)
            write_record(options, torture, points, counted)
        for number in range(options.random):
            points.append(torture.killed_at_random(number, draw))
            progress(points)
            write_record(options, torture, points, counted)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if any(point.wrong for point in points) else 0)


def write_record(options: argparse.Namespace, torture: Torture, points: list[Point], counted: dict[str, int]) -> None:
    """What was found so far."""
    record = {
        "points": len(points),
        "kills": sum(point.killed for point in points),
        "resumptions": sum(point.resumed for point in points),
        "failed": [asdict(point) for point in points if point.wrong],
        "points by kind": {kind: sum(point.kind == kind for point in points) for kind in sorted({point.kind for point in points})},
        "calls in a run": counted,
        "seed": options.seed,
        "seconds of a run": round(torture.seconds, 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": " ".join(["python", "tests/torture/harness.py", *sys.argv[1:]]),
        "all": [f"{point.kind}, {point.at}: killed {point.killed}x, resumed {point.resumed}x" for point in points],
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")


def progress(points: list[Point]) -> None:
    """One line a point on stderr."""
    point = points[-1]
    print(f"{len(points)} {point.kind} {point.at}: killed {point.killed}, {point.wrong or 'as it should be'}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
