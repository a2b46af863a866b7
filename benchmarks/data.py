"""How fast data is prepared, against the tokenizer alone, and in how much memory: `make bench-data`, saved as docs/benchmarks/data.json.

Times are of the processor (one process, one thread), so that other work on the machine disturbs them little. The tokenizer's figure is its
own `encode_batch` on the same rendered texts in chunks of the same size, measured in turn with preparation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

OUTPUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "data.json"
SPEED_ROWS = 200_000
MEMORY_ROWS = (20_000, 200_000)
TURNS = (4, 16, 64, 256)
TURNS_IN_ALL = 16_384
CHUNK = 1000
TARGET_ROWS = 10_000
TARGET_SHARE = 0.8


def conversation(generator: random.Random, words: list[str], turns: int = 2) -> list[dict[str, str]]:
    """Random English words: 10 in a question, 14 in an answer."""
    return [
        {"role": ("user", "assistant")[turn % 2], "content": " ".join(generator.choices(words, k=(10, 14)[turn % 2]))}
        for turn in range(turns)
    ]


def write_rows(path: Path, rows: int) -> Path:
    """A .jsonl of short conversations; about 60 tokens each with SmolLM2's template, which adds a system message."""
    from finetune.data.general import general_text

    generator, words = random.Random(0), general_text().split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            file.write(json.dumps({"messages": conversation(generator, words)}) + "\n")
    return path


def tokenizer() -> Any:
    """That of SmolLM2-135M-Instruct."""
    from transformers import AutoTokenizer

    from finetune.model.builtin import resolve_model

    return AutoTokenizer.from_pretrained(resolve_model("builtin:smollm2-135m"), local_files_only=True)


def prepared(path: Path, cache: Path, loaded: Any) -> dict[str, float]:
    """One whole `prepare` with its own cache directory."""
    from finetune.config.data import Data
    from finetune.data.prepare import prepare
    from finetune.data.render import Renderer

    os.environ["FINETUNE_CACHE"] = str(cache)
    data = Data.model_validate({"train": [{"source": str(path)}], "validation": {"fraction": 0.02}, "processes": 1})
    wall, cpu = time.perf_counter(), time.process_time()
    result = prepare(data, Renderer(loaded), 0)
    times = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    return times | {"tokens_per_row": float(result.train.lengths.mean())}


def speed(directory: Path, repeats: int) -> dict[str, Any]:
    """Rows a second of preparation and of the tokenizer alone, in turn."""
    loaded, path = tokenizer(), write_rows(directory / "speed.jsonl", SPEED_ROWS)
    texts = [loaded.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in path.read_text().splitlines()]
    prepared(write_rows(directory / "warm.jsonl", CHUNK), directory / "warm", loaded)  # imports
    found: dict[str, list[float]] = {"prepare": [], "tokenizer": [], "ratio": [], "prepare_wall": []}
    for repeat in range(repeats):
        begun = time.process_time()
        for start in range(0, SPEED_ROWS, CHUNK):
            loaded.backend_tokenizer.encode_batch(texts[start : start + CHUNK], add_special_tokens=False)
        found["tokenizer"].append(SPEED_ROWS / (time.process_time() - begun))
        times = prepared(path, directory / f"cache{repeat}", loaded)
        found["prepare"].append(SPEED_ROWS / times["cpu_s"])
        found["prepare_wall"].append(SPEED_ROWS / times["wall_s"])
        found["ratio"].append(found["prepare"][-1] / found["tokenizer"][-1])
    summary = {name: spread(values) for name, values in found.items()}
    wanted = min(TARGET_ROWS, TARGET_SHARE * summary["tokenizer"]["median"])
    return {
        "rows": SPEED_ROWS,
        "tokens_per_row": round(times["tokens_per_row"], 1),
        "rows_per_core_second": summary,
        "target_rows_per_core_second": round(wanted),
        "target_met": summary["prepare"]["median"] >= wanted,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def memory(path: Path, cache: Path) -> dict[str, float]:
    """Peak memory of this process after one preparation, and the time of a second one."""
    loaded = tokenizer()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    first = prepared(path, cache, loaded)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    second = prepared(path, cache, loaded)
    return {"before_mib": round(before, 1), "peak_mib": round(peak, 1), "cpu_s": first["cpu_s"], "second_cpu_s": second["cpu_s"]}


def turns() -> dict[str, float]:
    """Microseconds a turn of rendering and tokenizing conversations of 4 to 256 turns."""
    from finetune.data.general import general_text
    from finetune.data.records import Conversation, Message
    from finetune.data.render import Renderer

    renderer, words = Renderer(tokenizer()), general_text().split()
    found = {}
    for count in TURNS:
        generator = random.Random(0)
        records = [
            Conversation(tuple(Message(**turn) for turn in conversation(generator, words, count)), f"row {number}")
            for number in range(TURNS_IN_ALL // count)
        ]
        renderer.examples(records[:2], "assistant")
        begun = time.process_time()
        renderer.examples(records, "assistant")
        found[str(count)] = round((time.process_time() - begun) / TURNS_IN_ALL * 1e6, 2)
    return found


def child(*arguments: object) -> Any:
    """One measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from finetune.hardware import detect

    names = ("tokenizers", "transformers", "jinja2", "pyarrow", "numpy", "rensa")
    found = {"cpu": detect().name, "cores": os.cpu_count(), "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in names}


def main() -> None:
    """Measure everything, print it and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=("speed", "memory", "turns"))
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    match chosen.part:
        case "speed":
            print(json.dumps(speed(Path(chosen.arguments[0]), int(chosen.arguments[1]))))
        case "memory":
            print(json.dumps(memory(Path(chosen.arguments[0]), Path(chosen.arguments[1]))))
        case "turns":
            print(json.dumps(turns()))
        case None:
            everything(chosen.repeats)


def everything(repeats: int) -> None:
    """All parts, each in its own process."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        found: dict[str, Any] = {"machine": machine(), "speed": child("speed", directory, repeats)}
        peaks = {rows: child("memory", write_rows(directory / f"{rows}.jsonl", rows), directory / f"memory-{rows}") for rows in MEMORY_ROWS}
        found["memory"] = {str(rows): peak for rows, peak in peaks.items()}
        small, large = (peaks[rows]["peak_mib"] for rows in MEMORY_ROWS)
        found["memory"]["growth_at_10x_rows"] = round(large / small - 1, 4)
        found["microseconds_per_turn"] = child("turns")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
