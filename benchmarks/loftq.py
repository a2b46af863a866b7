"""LoftQ on a real model: what it gains and costs, and that its memory does not grow with the number of layers.

Run with `make bench-loftq`; writes docs/benchmarks/loftq.json. Every arm is a process of its own with an empty cache.

Perplexity is that of the general text that ships with the package (about 2,000 tokens, in pieces of 512), under SmolLM2-135M in fp32, as
plain NF4, and as NF4 with the adapter at LoftQ's start. Memory is the peak of the process's anonymous memory while the start is computed
and put into the model, above what it held with the quantized model and the fresh adapter in place: the pages of mapped files, which
the system takes back when it needs them, are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import FourBit, LoftqInit, Lora, NoQuantization, Quantization
from finetune.data.general import general_text
from finetune.data.render import Example
from finetune.model.adapters import attach
from finetune.model.builtin import BUILTIN, resolve_model
from finetune.model.computed_start import return_freed_memory
from finetune.model.load import load_base, load_tokenizer
from finetune.model.loftq import Quantizer, apply_loftq
from finetune.scoring import Scorer

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks" / "loftq.json"
NF4 = FourBit(method="nf4")
CPU = torch.device("cpu")
ARMS = ((16, 1), (16, 5), (64, 1), (64, 5))
"""(rank, iterations)"""
LAYERS = (8, 32, 64)
_BLOCK = 512
_WIDTH = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 1000}


# --- one arm, in a process of its own ------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """Memory of this process in MiB above what it was at the start, sampled every two milliseconds."""

    start: dict[str, float]
    peak: dict[str, float] = field(default_factory=lambda: {"RssAnon": 0.0, "VmRSS": 0.0})
    """Highest so far: of the process's own pages, and with pages of mapped files."""
    end: float = 0.0
    """Own pages afterwards."""

    def sample(self) -> None:
        """Look once."""
        now = _resident()
        self.peak = {kind: max(self.peak[kind], now[kind] - self.start[kind]) for kind in self.peak}
        self.end = now["RssAnon"] - self.start["RssAnon"]


def _resident() -> dict[str, float]:
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) / 1024 for name, _, value in lines if name in ("RssAnon", "VmRSS")}


@contextmanager
def measured() -> Iterator[Memory]:
    """Watch the memory of the block; what was freed before it begins goes back to the system first."""
    return_freed_memory()
    memory, done = Memory(_resident()), threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            memory.sample()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
        memory.sample()


def perplexity(model: Any, base: Path) -> float:
    """Of the general text; each piece's first token is context only."""
    ids = tuple(load_tokenizer(base)(general_text(), add_special_tokens=False).input_ids)
    pieces = [ids[start : start + _BLOCK] for start in range(0, len(ids) - 1, _BLOCK)]
    blocks = [Example(piece, (False, *(True for _ in piece[1:])), "general text") for piece in pieces]
    return math.exp(Scorer(model, CPU, "fp32", _BLOCK).mean_loss(blocks))


def plain(base: Path, quantization: Quantization) -> dict[str, Any]:
    """The model without an adapter."""
    return {"perplexity": perplexity(load_base(base, quantization, torch.float32, CPU), base)}


def loftq(base: Path, rank: int, iterations: int, *, text: bool) -> dict[str, Any]:
    """The start of an adapter on every linear layer, with alpha = rank."""
    tuning = Lora(method="lora", rank=rank, alpha=rank, init=LoftqInit(method="loftq", iterations=iterations))
    torch.manual_seed(0)
    model = attach(load_base(base, NF4, torch.float32, CPU), tuning)
    modules = 0

    def count(_done: int, of: int) -> None:
        nonlocal modules
        modules = of

    with measured() as memory:
        begun = time.perf_counter()
        report = apply_loftq(model, base, tuning, Quantizer(NF4, torch.float32), count)
        seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    apply_loftq(model, base, tuning, Quantizer(NF4, torch.float32))
    return {
        "rank": rank,
        "iterations": iterations,
        "modules": modules,
        "seconds": seconds,
        "seconds_from_cache": time.perf_counter() - begun,
        "peak_mib": memory.peak["RssAnon"],
        "peak_with_mapped_files_mib": memory.peak["VmRSS"],
        "kept_mib": memory.end,
        "factors_mib": (report.directory / report.file).stat().st_size / 2**20,
        "error": {kind: [error.before, error.after] for kind, error in report.layers.items()},
        **({"perplexity": perplexity(model, base)} if text else {}),
    }


def random_llama(directory: Path, layers: int) -> Path:
    """A Llama of one width and ``layers`` layers, with weights drawn from a normal distribution, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_WIDTH, num_hidden_layers=layers)).save_pretrained(directory)
    return directory


def run_arm(arm: str) -> dict[str, Any]:
    """``fp32``, ``nf4``, ``loftq RANK ITERATIONS`` or ``layers COUNT ITERATIONS``."""
    kind, *numbers = arm.split()
    match kind, [int(number) for number in numbers]:
        case "fp32", []:
            return plain(resolve_model(BUILTIN), NoQuantization())
        case "nf4", []:
            return plain(resolve_model(BUILTIN), NF4)
        case "loftq", [rank, iterations]:
            base = resolve_model(BUILTIN)
            with tempfile.TemporaryDirectory() as cache:
                os.environ["FINETUNE_CACHE"] = cache
                return loftq(base, rank, iterations, text=True)
        case "layers", [count, iterations]:
            with tempfile.TemporaryDirectory() as directory:
                os.environ["FINETUNE_CACHE"] = f"{directory}/cache"
                # in another process, so that its memory is not taken for room that LoftQ needs
                subprocess.run([sys.executable, __file__, "--write", directory, "--layers", str(count)], check=True)
                return {"layers": count, **loftq(Path(directory), 16, iterations, text=False)}
    raise SystemExit(f"there is no arm {arm!r}")


# --- all arms ------------------------------------------------------------------------------------------------------------------------


def in_process(arm: str) -> dict[str, Any]:
    """The result of ``arm``, computed by a fresh interpreter."""
    done = subprocess.run([sys.executable, __file__, "--arm", arm], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "processor": processor or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def main() -> None:
    """Run all arms, print a line each, write the results."""
    results: dict[str, Any] = {"machine": machine(), "model": BUILTIN}
    for name in ("fp32", "nf4"):
        results[name] = in_process(name)["perplexity"]
        print(f"{name:22} perplexity {results[name]:.3f}", flush=True)
    gap = results["nf4"] - results["fp32"]
    results["loftq"] = []
    for rank, iterations in ARMS:
        found = in_process(f"loftq {rank} {iterations}")
        found["share_of_gap_closed"] = (results["nf4"] - found["perplexity"]) / gap
        results["loftq"].append(found)
        print(
            f"LoftQ r={rank:<3} {iterations} iterations: perplexity {found['perplexity']:.3f}, "
            f"{found['share_of_gap_closed']:.0%} of the gap closed; "
            f"{found['seconds']:.1f} s ({found['seconds_from_cache']:.1f} s from the cache), "
            f"peak {found['peak_mib']:.0f} MiB ({found['peak_with_mapped_files_mib']:.0f} with mapped files)",
            flush=True,
        )
    results["layers"] = layers()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def layers() -> list[dict[str, Any]]:
    """Memory by number of layers, for a base that stays and for one that is replaced."""
    results = []
    for iterations in (1, 2):
        for count in LAYERS:
            found = in_process(f"layers {count} {iterations}")
            results.append(found)
            print(
                f"{count:2} layers, iterations={iterations}: peak {found['peak_mib']:.1f} MiB above the model "
                f"({found['peak_with_mapped_files_mib']:.1f} with mapped files), {found['kept_mib']:.1f} MiB afterwards; "
                f"factors on disk {found['factors_mib']:.1f} MiB",
                flush=True,
            )
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    if arguments.write:
        random_llama(arguments.write, arguments.layers)
    elif arguments.arm:
        print(json.dumps(run_arm(arguments.arm)))
    else:
        main()
