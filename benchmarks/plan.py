"""Memory that the plan predicts against what `finetune train` takes. `make bench-plan`; `--gpu` on an NVIDIA GPU.

**CPU**: SmolLM2-135M in eight configurations, a half of all sixteen of {plain bf16, NF4} x {rank 8, 64} x {checkpointing on, off} x {1024,
2048 tokens a micro-batch}, chosen so that every pair of settings occurs equally often. Each is run three times, in processes of their
own: the whole command `finetune train` over two steps of two micro-batches that are full. Measured is the peak of the process's own
memory: its anonymous and shared pages (RssAnon + RssShmem of /proc/PID/status), read every 10 ms, so that a shorter peak is missed, and
the pages of its forks that are theirs alone (Private_Dirty of /proc/PID/smaps_rollup), read every 100 ms: they give none back. It is
compared with the plan's parts that are in pages of no file (`Memory.own`), made from the configuration and the model's sizes alone, with
the library's constants. Pages of files (libraries, and weights that are computed with as they lie in their file) are left out on
both sides, because the kernel takes them back and reads them again as it likes; the peak with them (ru_maxrss) and the plan's total stand
beside, and differ for that reason.

**GPU** (`--gpu`): `benchmarks.plan_gpu`.

Writes docs/benchmarks/plan.json and plan.md. `--only N` runs one configuration and keeps nothing; `--tiny` goes through the GPU's part
with small shapes on any machine, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.plan_gpu import gpu_cases, run_gpu
from benchmarks.plan_page import BAR, markdown, mebibytes
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.hardware import Machine
from finetune.planning.lookup import find_shape
from finetune.planning.memory import Memory, estimate_memory, setting_of
from finetune.planning.parameters import count_parameters
from finetune.planning.resolve import resolve

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks" / "plan.json"
ROW_TOKENS = {1024: 256, 2048: 512}
"""Length of a row by the tokens of a micro-batch: attention of the shorter ones is kept on a CPU."""
MICRO_BATCHES, STEPS, REPEATS = 2, 2, 3
_BETWEEN_S = 0.01
_FORKS_EVERY = 10  # of these: to count their pages takes the kernel 20 ms a GiB
_WORDS = 400


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration."""

    base: str
    """`none` (bf16) or `nf4`."""
    rank: int
    checkpointing: bool
    tokens: int

    @property
    def name(self) -> str:
        """For people."""
        base = {"none": "bf16", "nf4": "NF4"}[self.base]
        return f"{base}, rank {self.rank}, checkpointing {'on' if self.checkpointing else 'off'}, {self.tokens} tokens"

    def config(self, rows: Path, output: Path) -> dict[str, Any]:
        """The run."""
        length = ROW_TOKENS[self.tokens]
        return {
            "model": {"id": "builtin:smollm2-135m"},
            "quantization": {"method": self.base},
            "tuning": {"method": "lora", "rank": self.rank, "alpha": self.rank},
            "data": {
                "train": [{"source": str(rows)}],
                "validation": None,
                "max_tokens": length,
                "supervise": "all",
                "overlong": "split",
            },
            "train": {
                "max_steps": STEPS,
                "batch_size": MICRO_BATCHES * self.tokens // length,
                "tokens_per_device": self.tokens,
                "precision": "bf16",
                "gradient_checkpointing": self.checkpointing,
            },
            "output": str(output),
        }


def cases() -> list[Case]:
    """Those of an even number of second settings."""
    levels = product(enumerate(("none", "nf4")), enumerate((8, 64)), enumerate((False, True)), enumerate((1024, 2048)))
    return [Case(*(value for _, value in each)) for each in levels if sum(place for place, _ in each) % 2 == 0]


def write_rows(path: Path, tokens: int) -> Path:
    """One text of more than ``tokens`` tokens in drawn words, which preparation cuts into rows of one length."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(_WORDS)]
    text = " ".join(draw.choices(words, k=tokens))
    path.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    return path


def predict(config: Config, threads: int, row_tokens: int) -> Memory:
    """The plan, for a CPU with bf16."""
    shape = find_shape(config.model)
    resolved = resolve(config, Machine("cpu", "a CPU", 1, 2**34, bf16=True))
    setting = setting_of(resolved, "cpu", threads=threads, example_tokens=row_tokens)
    return estimate_memory(shape, count_parameters(shape, config), config, setting)


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that a process had at a time, in bytes."""

    own: int
    """In pages of no file, as sampled."""
    resident: int
    """With pages of files, as the kernel counts it."""


def own_memory(pid: int) -> int:
    """Bytes of a process in pages of no file; 0 for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # gone
        return 0
    sizes = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("RssAnon:", "RssShmem:")))
    return sum(int(size.split()[0]) * 1024 for size in sizes.values())


def private_memory(pid: int) -> int:
    """Bytes of a process in pages that it wrote and shares with none; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # gone
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


def children(pid: int) -> list[int]:
    """What a process has started, without what those have."""
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:  # gone
        return []


def watch(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, Peak]:
    """Run ``command`` to its end: its exit status, and its peak. All that it says goes to ``log``."""
    own = forks = 0
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink, cwd=ROOT)
        looks = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return process.returncode, Peak(own, usage.ru_maxrss * 1024)
            if looks % _FORKS_EVERY == 0:
                forks = max(forks, sum(private_memory(fork) for fork in children(process.pid)))
            own = max(own, own_memory(process.pid) + forks)
            time.sleep(_BETWEEN_S)
            looks += 1


def train(case: Case, threads: int) -> tuple[Memory, Peak]:
    """What the plan foretells of one case, and what one process has of it."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rows = write_rows(directory / "rows.jsonl", 2 * STEPS * MICRO_BATCHES * case.tokens)
        path = directory / "run.yaml"
        path.write_text(json.dumps(case.config(rows, directory / "run")), encoding="utf-8")
        predicted = predict(load_config(path).config, threads, ROW_TOKENS[case.tokens])
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        status, peak = watch([sys.executable, "-m", "finetune", "train", str(path)], environment, directory / "log")
        if status:
            raise SystemExit(f"error: {case.name} failed\n{(directory / 'log').read_text(encoding='utf-8')[-2000:]}")
    return predicted, peak


def row_of(case: Case, threads: int, predicted: Memory, peaks: list[Peak]) -> dict[str, Any]:
    """Prediction and measurements of one case; the error is that of the median."""
    own = [peak.own for peak in peaks]
    return {
        "case": case.name,
        "threads": threads,
        "predicted": predicted.own,
        "measured": statistics.median(own),
        "measured_each": own,
        "error": predicted.own / statistics.median(own) - 1,
        "predicted_total": predicted.total,
        "resident": statistics.median(peak.resident for peak in peaks),
        "parts": predicted.parts,
    }


# --- the command line ---------------------------------------------------------------------------------------------------------------


def _save(key: str, rows: list[dict[str, Any]], **about: Any) -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    found |= {key: rows, f"{key}_on": about}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(markdown(found), encoding="utf-8")


def _on_gpu(tiny: bool) -> int:
    import torch

    if not tiny and not torch.cuda.is_available():
        print("error: there is no NVIDIA GPU here\n  fix: run it where nvidia-smi lists one", file=sys.stderr)
        return 4
    rows = []
    for case in gpu_cases(tiny):
        rows.append(run_gpu(case, "cpu" if tiny else "cuda"))
        print(json.dumps(rows[-1]), flush=True)
    if tiny:
        return 0
    _save("gpu", rows, device=torch.cuda.get_device_name(0), torch=torch.__version__)
    return int(any(abs(row["error"]) > BAR for row in rows))


def _on_cpu(threads: int, only: int | None) -> int:
    chosen = cases() if only is None else cases()[only : only + 1]
    rows = []
    for case in chosen:
        runs = [train(case, threads) for _ in range(REPEATS)]
        row = row_of(case, threads, runs[0][0], [peak for _, peak in runs])
        rows.append(row)
        each = ", ".join(mebibytes(size) for size in row["measured_each"])
        print(f"{row['case']}: predicted {mebibytes(row['predicted'])} MiB, measured {each} ({row['error']:+.1%})")
        print("  " + ", ".join(f"{name} {mebibytes(size)}" for name, size in row["parts"].items() if size), flush=True)
    if only is None:
        _save("cpu", rows, threads=threads, python=platform.python_version(), libc="-".join(platform.libc_ver()))
    return int(any(abs(row["error"]) > BAR for row in rows))


def main() -> int:
    """The command line; exits with 1 where an error is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="cores of a run on a CPU")
    parser.add_argument("--only", type=int, metavar="N", help="one of the eight configurations, 0 to 7")
    parser.add_argument("--gpu", action="store_true", help="on an NVIDIA GPU")
    parser.add_argument("--tiny", action="store_true", help="the GPU's part with small shapes on any machine")
    chosen = parser.parse_args()
    if chosen.gpu or chosen.tiny:
        return _on_gpu(chosen.tiny)
    return _on_cpu(chosen.threads, chosen.only)


if __name__ == "__main__":
    sys.exit(main())
