"""Merging: how much of what was learned each type keeps, and what the fold costs in time and memory.

Run with `make bench-merge`; writes docs/benchmarks/merge.json. `--part` names parts to measure anew, the others are kept.

**kept**: a run is merged as bf16 (nearest and stochastic rounding), fp16 and fp32, each reloaded by plain transformers in a fresh process.
share = (loss before training - loss merged) / (loss before training - loss of the adapter model), on the run's validation rows. Two runs:
12 steps of configs/quickstart.yaml, and the quickstart's own (trained where `runs/quickstart` is not there).

**cost**: three ways to make a merged bf16 checkpoint of a bf16 base and a rank-16 adapter on all linear layers: the fold of
`finetune merge` (without verification, whose cost is stated apart), PEFT's merge_and_unload with save_pretrained, and, as the least any
tool could take, a copy of the base's files with fsync. Each is a process of its own; their order changes from repeat to repeat. Seconds are
those of the work, without the start of the process; memory is sampled every 5 ms: `hwm` is VmHWM, the peak with the pages of mapped files,
`own` the peak of RssAnon, the process's own pages, both in MiB. Three values are minimum, median, maximum. Models: the real SmolLM2-135M,
and random Llamas of Llama-3.2's shapes with 1.24 and 3.21 billion parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks" / "merge.json"
ROOT = RESULTS.parents[2]
_HEADS = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": True, "rope_theta": 500000.0, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, **_HEADS, "head_dim": 64},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, **_HEADS},
}
MODELS = ("smollm2-135m", *SHAPES)
WAYS = ("fold", "peft", "copy")
_PEFT_NEEDS = 1.6
"""Free memory by the bytes of the model, besides a gigabyte, below which merge_and_unload is left out: it takes 1.1 itself."""
_SHARD_BYTES = 1 << 30


# --- inputs --------------------------------------------------------------------------------------------------------------------------


def write_base(directory: Path, shape: str) -> Path:
    """A random Llama in bf16 shards of about 1 GiB, as a hub has them, one weight in memory at a time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune.model.shards import ShardWriter, Slot

    config = LlamaConfig(**SHAPES[shape], dtype=torch.bfloat16, max_position_embeddings=8192)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    slots = {name: Slot(tuple(parameter.shape), torch.bfloat16) for name, parameter in model.named_parameters()}
    shards: list[dict[str, Slot]] = [{}]
    for name, slot in slots.items():
        if sum(other.size for other in shards[-1].values()) + slot.size > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = slot
    placement = {}
    generator = torch.Generator().manual_seed(0)
    for number, chosen in enumerate(filter(None, shards), 1):
        file = f"model-{number:05d}-of-{len(list(filter(None, shards))):05d}.safetensors"
        with ShardWriter(directory / file, chosen) as writer:
            for name, slot in chosen.items():
                values = torch.empty(slot.shape, dtype=torch.bfloat16)
                writer.write(name, values.fill_(1.0) if len(slot.shape) == 1 else values.normal_(0, 0.02, generator=generator))
                placement[name] = file
    size = sum(slot.size for slot in slots.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": placement}))
    return directory


def write_adapter(directory: Path, base: Path, rank: int = 16) -> Path:
    """A random LoRA on all linear layers of ``base``, in fp32 as training stores it."""
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    linear = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear and "lm_head" not in name}
    names = sorted({name.rpartition(".")[2] for name in linear})
    LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=names).save_pretrained(directory)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in linear.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) * 0.02
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.02
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


# --- one way, in a process of its own ------------------------------------------------------------------------------------------------


def _memory() -> dict[str, float]:
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) / 1024 for name, _, value in lines if name in ("RssAnon", "VmHWM")}


@contextmanager
def sampled() -> Iterator[dict[str, float]]:
    """MiB: `start` (own pages before the block), `own` (their peak) and, once the block is over, `hwm`."""
    found, done = {"start": _memory()["RssAnon"], "own": 0.0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            found["own"] = max(found["own"], _memory()["RssAnon"])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found["hwm"] = _memory()["VmHWM"]


def _fold(base: Path, adapter: Path, destination: Path) -> None:
    from finetune.config.schema import NoQuantization
    from finetune.merging.fold import fold
    from finetune.merging.inputs import MergeSource

    fold(MergeSource(base, adapter, NoQuantization(), torch.bfloat16), destination, torch.bfloat16)


def _peft(base: Path, adapter: Path, destination: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(destination)
    for path in destination.glob("*.safetensors"):
        _fsync(path)


def _copy(base: Path, _adapter: Path, destination: Path) -> None:
    destination.mkdir()
    for path in base.glob("*"):
        shutil.copyfile(path, destination / path.name)
        _fsync(destination / path.name)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def one(way: str, base: Path, adapter: Path, destination: Path) -> dict[str, float]:
    """Seconds and memory of one ``way``."""
    work: dict[str, Callable[[Path, Path, Path], None]] = {"fold": _fold, "peft": _peft, "copy": _copy}
    if way != "copy":  # importing is the start of a process, not its work
        import peft  # noqa: F401
        import transformers  # noqa: F401

        import finetune.merging.fold  # noqa: F401
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))))
    with sampled() as memory:
        began, used = time.perf_counter(), time.process_time()
        work[way](base, adapter, destination)
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
    return {name: round(value, 3) for name, value in {**seconds, **memory}.items()}


# --- parts ---------------------------------------------------------------------------------------------------------------------------


def cost(model: str, repeats: int, folder: Path, chosen: list[str]) -> dict[str, Any]:
    """The ``chosen`` ways of one ``model``, ``repeats`` times, interleaved."""
    from finetune.model.builtin import resolve_model

    base = resolve_model("builtin:smollm2-135m") if model not in SHAPES else write_base(folder / "base", model)
    adapter = write_adapter(folder / "adapter", base)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    ways, left_out = list(chosen), {way: "not measured: left out by --way" for way in WAYS if way not in chosen}
    free = _available()
    if "peft" in ways and free < _PEFT_NEEDS * size + (1 << 30):
        ways.remove("peft")
        left_out["peft"] = f"not measured: {free / 2**30:.1f} GiB of memory free, and it takes about {_PEFT_NEEDS * size / 2**30:.1f}"
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in ways[repeat % len(ways) :] + ways[: repeat % len(ways)]:
            destination = folder / "merged"
            command = [sys.executable, __file__, "--one", way, str(base), str(adapter), str(destination)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(destination)
            print(model, way, runs[way][-1], flush=True)
    found: dict[str, Any] = {"bytes": size, "repeats": repeats, "load": os.getloadavg()[0], **left_out}
    for way in ways:
        found[way] = {key: [min(values), statistics.median(values), max(values)] for key, values in _columns(runs[way]).items()}
    if "fold" in ways and "copy" in ways:
        found["fold_over_copy"] = round(found["fold"]["seconds"][1] / found["copy"]["seconds"][1], 2)
    shutil.rmtree(folder)
    return found


def _columns(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [run[key] for run in runs] for key in runs[0]}


def kept(run: Path, folder: Path) -> dict[str, Any]:
    """The share of the validation gain of ``run`` that every type keeps, and what the default chooses."""
    from finetune import api

    began = time.perf_counter()
    report = api.merge(run, folder / "all", compare_dtypes=True)
    found: dict[str, Any] = {"default": report.dtype, "seconds_all_types": round(time.perf_counter() - began, 1)}
    for trial in report.trials:
        found[trial.name] = trial.parity.as_json() if trial.parity else trial.reason
    shutil.rmtree(folder / "all")
    return found


def verification(run: Path, folder: Path) -> dict[str, float]:
    """Seconds of a whole verified merge of ``run`` into bf16, and of the fold in it."""
    from finetune import api

    began, marks = time.perf_counter(), []
    api.merge(run, folder / "bf16", dtype="bf16", progress=lambda *_: marks.append(time.perf_counter()))
    whole = time.perf_counter() - began
    shutil.rmtree(folder / "bf16")
    return {"merge_seconds": round(whole, 1), "of_it_fold_seconds": round(marks[-1] - marks[0], 1)}


def train(name: str, *overrides: str) -> Path:
    """The run ``name``, trained where it is not there."""
    from finetune import api

    path = ROOT / "runs" / name
    if not (path / "adapter").is_dir():
        api.train(api.load_config(ROOT / "configs" / "quickstart.yaml", [f"output={path}", *overrides]).config)
    return path


def _available() -> int:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")


def machine() -> dict[str, object]:
    """Where the figures come from."""
    from finetune.hardware import detect

    threads = int(os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())))
    memory = round(detect().memory_bytes / 2**30)
    return {"processor": detect().name, "cores": os.cpu_count(), "threads": threads, "memory_gib": memory, "system": platform.platform(),
            "torch": torch.__version__}  # fmt: skip


def main() -> None:
    """Measure the chosen parts and write them beside those that were measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=["12-steps", "quickstart", *MODELS], help="default: all")
    parser.add_argument("--way", action="append", choices=WAYS, help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=4, metavar=("WAY", "BASE", "ADAPTER", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one[0], *map(Path, arguments.one[1:]))))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for part in arguments.part or ["12-steps", "quickstart", *MODELS]:
        with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=os.environ.get("BENCH_DIR")) as folder:
            if part in MODELS:
                found = cost(part, arguments.repeats, Path(folder, "work"), arguments.way or list(WAYS))
            else:
                run = train("quickstart") if part == "quickstart" else train("bench-12-steps", "train.max_steps=12")
                found = kept(run, Path(folder)) | {"verification": verification(run, Path(folder))}
        results[part] = found | {"machine": machine()}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({part: found}, indent=1), flush=True)


if __name__ == "__main__":
    main()
