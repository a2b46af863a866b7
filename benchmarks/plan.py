"""Memory that the plan predicts against what `finetune train` takes. `make bench-plan`; `--gpu` on an NVIDIA GPU.

**CPU**: SmolLM2-135M in eight configurations, a half of all sixteen of {plain bf16, NF4} x {rank 8, 64} x {checkpointing on, off} x {1024,
2048 tokens a micro-batch}, chosen so that every pair of settings occurs equally often. Each is a process of its own: the whole command
`finetune train` over two steps of two micro-batches that are full. Measured is the peak of its resident memory as the kernel counts it
(ru_maxrss), which includes pages of mapped files; it is compared with the total of the plan, made from the configuration and the model's
sizes alone, with the library's constants.

**GPU** (`--gpu`): models of the sizes of Llama 3 8B and 70B with random weights, built on the GPU layer by layer, trained for two steps
through the functions that a run uses. Measured are the peak that torch's allocator handed out, which is compared with the plan's parts
without `process` and `reserve`, and the peak that it took from the device, compared with the total without `process`.

Writes docs/benchmarks/plan.json and plan.md. `--only N` runs one configuration and keeps nothing; `--tiny` goes through the GPU's part
with small shapes on any machine, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.hardware import Machine
from finetune.planning.lookup import find_shape
from finetune.planning.memory import Memory, estimate_memory, setting_of
from finetune.planning.parameters import count_parameters
from finetune.planning.resolve import resolve
from finetune.planning.shapes import read_shape

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks" / "plan.json"
ROW_TOKENS = {1024: 256, 2048: 512}
"""Length of a row by the tokens of a micro-batch: attention of the shorter ones is kept on a CPU."""
MICRO_BATCHES, STEPS = 2, 2
BAR = 0.10
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


def run(case: Case, threads: int, directory: Path) -> dict[str, Any]:
    """Prediction and measurement of one case."""
    rows = write_rows(directory / "rows.jsonl", 2 * STEPS * MICRO_BATCHES * case.tokens)
    path = directory / "run.yaml"
    path.write_text(json.dumps(case.config(rows, directory / "run")), encoding="utf-8")
    predicted = predict(load_config(path).config, threads, ROW_TOKENS[case.tokens])
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", "train", str(path)], env=environment, stdout=log, stderr=log, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: {case.name} failed\n{(directory / 'log').read_text(encoding='utf-8')[-2000:]}")
    measured = usage.ru_maxrss * 1024
    return {
        "case": case.name,
        "threads": threads,
        "predicted": predicted.total,
        "measured": measured,
        "error": predicted.total / measured - 1,
        "parts": predicted.parts,
    }


# --- GPU -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GpuCase:
    """One model and one way to train it."""

    name: str
    sizes: tuple[int, int, int, int, int, int]
    """As `benchmarks.engine.gpu.llama` takes them."""
    base: str
    rank: int
    checkpointing: bool
    tokens: int

    def config(self) -> Config:
        """The run, as far as a plan reads it."""
        return Config.model_validate(
            {
                "model": {"id": "drawn/llama"},
                "quantization": {"method": self.base},
                "tuning": {"method": "lora", "rank": self.rank, "alpha": self.rank},
                "optimizer": {"method": "adamw"},
                "data": {"train": [{"source": "rows.jsonl"}], "max_tokens": self.tokens},
                "train": {"tokens_per_device": self.tokens, "precision": "bf16", "gradient_checkpointing": self.checkpointing},
                "output": "out",
            }
        )


def gpu_cases(tiny: bool) -> list[GpuCase]:
    """Three models; small ones with ``tiny``."""
    from benchmarks.engine.gpu import LLAMA_8B, LLAMA_70B

    small = (64, 128, 2, 4, 2, 512)
    eight, seventy, tokens = (small, small, 64) if tiny else (LLAMA_8B, LLAMA_70B, 4096)
    return [
        GpuCase("8B, bf16, rank 16, checkpointing off", eight, "none", 16, False, tokens // 2),
        GpuCase("8B, NF4, rank 64, checkpointing on", eight, "nf4", 64, True, tokens),
        GpuCase("70B, NF4, rank 64, checkpointing on", seventy, "nf4", 64, True, tokens),
    ]


def run_gpu(case: GpuCase, device: str) -> dict[str, Any]:
    """Prediction and measurement of one case; without an NVIDIA GPU nothing is measured."""
    import torch

    from benchmarks.engine.gpu import llama

    shape_of = llama(*case.sizes)
    config = case.config()
    shape = read_shape(shape_of.to_dict(), case.name)
    setting = setting_of(resolve(config, Machine("cuda", "a GPU", 1, 2**37, bf16=True)), "cuda", example_tokens=case.tokens)
    predicted = estimate_memory(shape, count_parameters(shape, config), config, setting)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses = _steps(case, config, device)
    handed_out = predicted.total - predicted.parts["process"] - predicted.parts["reserve"]
    found = {"case": case.name, "predicted": predicted.total, "parts": predicted.parts, "losses": losses}
    if device == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        found |= {"measured": allocated, "error": handed_out / allocated - 1, "reserved": reserved}
        found |= {"error_reserved": (predicted.total - predicted.parts["process"]) / reserved - 1}
    return found


def _steps(case: GpuCase, config: Config, device: str) -> list[float]:
    """Losses of two steps, computed as a run computes them."""
    import torch

    from benchmarks.engine import gpu
    from finetune.config.schema import Lora
    from finetune.model.adapters import attach, trainable
    from finetune.model.fast import accelerate
    from finetune.model.head import target_losses
    from finetune.model.quantize import disable_cpu_repacking

    torch.manual_seed(0)
    assert isinstance(config.tuning, Lora)
    sizes = gpu.llama(*case.sizes)
    model = gpu.quantized(sizes, device) if case.base == "nf4" else _plain(sizes, device)
    disable_cpu_repacking(model)
    model = attach(model, config.tuning)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    accelerate(model, config.tuning)
    model.train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-4, fused=True)
    ids = torch.randint(10, sizes.vocab_size, (1, case.tokens))
    losses = []
    for _ in range(STEPS):
        with torch.autocast(device, torch.bfloat16):
            loss = target_losses(model, ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def _plain(sizes: Any, device: str) -> Any:
    """A bf16 model, drawn on the device weight by weight."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from benchmarks.engine.gpu import drawn

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(drawn(tuple(parameter.shape), device), requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(sizes).to(device)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


# --- the page ------------------------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, Any]) -> str:
    """The figures as a page."""
    lines = ["# Memory: the plan against the process", "", "Written by `make bench-plan` ([what is compared](../../benchmarks/plan.py))."]
    for title, rows in (("SmolLM2-135M on a CPU", found.get("cpu", [])), ("NVIDIA GPU", found.get("gpu", []))):
        lines += ["", f"## {title}", ""]
        if not rows:
            lines.append("Not measured.")
            continue
        lines += ["| run | predicted MiB | measured MiB | error |", "|---|---|---|---|"]
        lines += [
            f"| {row['case']} | {row['predicted'] / 2**20:,.0f} | {row['measured'] / 2**20:,.0f} | {row['error']:+.1%} |" for row in rows
        ]
        lines += ["", f"Largest error {max(abs(row['error']) for row in rows):.1%}; the bar is {BAR:.0%}."]
    return "\n".join(lines) + "\n"


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
        with tempfile.TemporaryDirectory() as directory:
            rows.append(run(case, threads, Path(directory)))
        row = rows[-1]
        print(
            f"{row['case']}: predicted {row['predicted'] / 2**20:,.0f} MiB, measured {row['measured'] / 2**20:,.0f} ({row['error']:+.1%})"
        )
        print("  " + ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in row["parts"].items() if size), flush=True)
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
