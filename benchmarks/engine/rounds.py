"""The comparison: rounds in which every tool runs once, kept as they come and continued after an interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.engine import data, runs
from benchmarks.engine.table import LORA, LORA_FP32, NF4
from benchmarks.engine.tools import FINETUNE, ROOT, TOOLS, TRL, TRL_SFT, Tool

RESULTS = ROOT / "docs" / "benchmarks" / "engine.json"
MODEL = "SmolLM2-135M-Instruct"
CANDIDATE_ROWS = 48
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class Variant:
    """What the base is, and how many rows are trained on it."""

    name: str
    rows: int
    nf4: bool
    settings: tuple[str, ...] = ()
    """Options of this project's command."""
    alone: bool = False
    """Whether only this project runs it, to be compared with the machine's limit."""

    def tools(self, number: int) -> list[Tool]:
        """Those of one round, in turn: another one begins each time, so that none always has the machine when it is cool or busy."""
        tools = [FINETUNE] if self.alone else list(TOOLS.values())
        first = number % len(tools)
        return tools[first:] + tools[:first]


PEERS = [tool for tool in TOOLS.values() if tool is not FINETUNE]
VARIANTS = (
    Variant(LORA, data.ROWS, nf4=False),
    Variant(LORA_FP32, data.ROWS, nf4=False, settings=("-o", "train.precision=fp32"), alone=True),
    Variant(NF4, data.ROWS, nf4=True),
)


class Results:
    """docs/benchmarks/engine.json, written after every run."""

    def __init__(self, path: Path = RESULTS) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for part in ("runs", "limits", "candidates"):
            self.found.setdefault(part, [])

    def save(self) -> None:
        """In one go: an interruption leaves the older file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)

    def has(self, part: str, key: dict[str, Any]) -> bool:
        """Whether ``part`` holds a result of the same code, data and machine that did not fail."""
        return any(_matches(row, key) and "failed" not in row for row in self.found[part])

    def add(self, part: str, key: dict[str, Any], row: dict[str, Any]) -> None:
        """Instead of what was there for the same round, tool and variant, of whatever code."""
        place = {name: key[name] for name in key if name != "of"}
        self.found[part] = [old for old in self.found[part] if not _matches(old, place)] + [key | row]
        self.save()


def _matches(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in key.items())


# --- what a result belongs to --------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures are measured on."""
    from finetune.hardware import detect

    found = detect()
    return {"processor": found.name, "cores": os.cpu_count(), "memory_gib": round(found.memory_bytes / 2**30, 1), "bf16": found.bf16}


def model() -> dict[str, Any]:
    """Its name and sizes, from which the operations of a token follow."""
    config = json.loads((runs.smollm2() / "config.json").read_text(encoding="utf-8"))
    return {"name": MODEL} | {name: config[name] for name in _SIZES}


def versions(python: Path) -> dict[str, str]:
    """Of the libraries in the environment of ``python``; empty where it does not run."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {(*_LIBRARIES,)!r}}}))"
    try:
        return dict(json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout))
    except (OSError, subprocess.CalledProcessError):
        return {}


def trl_versions() -> dict[str, str]:
    """Of TRL's own environment."""
    python = TRL.parent / "python"
    found = versions(python)
    if found:
        code = "import importlib.metadata as m; print(m.version('trl'))"
        found["trl"] = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return found


def source(tool: Tool) -> str:
    """Digest of the code that the tool runs and that is not a released package's."""
    files = sorted((ROOT / "finetune").rglob("*.py")) if tool is FINETUNE else [ROOT / "benchmarks" / "engine" / "plain.py"]
    return _digest(*files)


def _digest(*files: Path) -> str:
    digest = sha256()
    for file in files:
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


# --- the rounds ----------------------------------------------------------------------------------------------------------------------


def compare(results: Results, count: int, threads: int | None, variants: Sequence[Variant] = VARIANTS) -> Results:
    """``count`` rounds. What is in ``results`` already, and of the same code, data and machine, is not run again.

    The machine's limit is measured just before and just after this project's runs, since its speed wanders.
    """
    own = versions(Path(sys.executable))
    found = {TRL_SFT.name: trl_versions()}
    results.found |= {"machine": machine(), "model": model(), "versions": found[TRL_SFT.name] or own}
    works = {variant.name: runs.prepare_work(variant.rows) for variant in variants}
    results.found["data"] = results.found.get("data", {}) | {
        name: {"train": work.totals, "validation": work.validation} for name, work in works.items()
    }
    for number, variant, tool in _turns(count, variants):
        work = works[variant.name]
        of = {"machine": results.found["machine"], "data": _digest(work.files.train), "source": source(tool), "threads": threads}
        of |= {"versions": found.get(tool.name, own), "settings": list(variant.settings) if tool is FINETUNE else chosen(results, tool)}
        key = {"round": number, "variant": variant.name, "tool": tool.name, "of": of}
        if results.has("runs", key):
            continue
        _say(f"round {number + 1}, {variant.name}: {tool.name} ...")
        limits = [limit(work, threads)] if tool is FINETUNE else []
        job = runs.job(work, tool, nf4=variant.nf4, seed=number, threads=threads)
        row = runs.run(tool, job, work, of["settings"])
        limits += [limit(work, threads)] if tool is FINETUNE else []
        for when, rates in zip(("before", "after"), limits, strict=False):
            results.add("limits", {"round": number, "variant": variant.name, "when": when}, rates)
        results.add("runs", key, row)
        _say(_line(row))
    return results


def _turns(count: int, variants: Sequence[Variant]) -> Iterator[tuple[int, Variant, Tool]]:
    for number in range(count):
        for variant in variants:
            for tool in variant.tools(number):
                yield number, variant, tool


def candidates(results: Results, tools: Sequence[Tool], threads: int | None) -> Results:
    """Every setting of ``tools`` on some rows, to find the best of each; what is in ``results`` already is not run again."""
    results.found |= {"machine": machine(), "model": model(), "versions": trl_versions() or versions(Path(sys.executable))}
    work = runs.prepare_work(CANDIDATE_ROWS)
    of = {"machine": results.found["machine"], "data": _digest(work.files.train), "threads": threads}
    for tool in tools:
        of["versions"] = trl_versions() if tool is TRL_SFT else versions(Path(sys.executable))
        for name, settings in tool.candidates.items():
            key = {"tool": tool.name, "setting": name, "of": dict(of)}
            if results.has("candidates", key):
                continue
            _say(f"{tool.name}, {name} ...")
            row = runs.run(tool, runs.job(work, tool, threads=threads), work, settings, score=False)
            results.add("candidates", key, row)
            _say(_line(row))
    return results


def chosen(results: Results, tool: Tool) -> list[str]:
    """The settings of the fastest candidate of ``tool`` in steady state; its own where none was tried."""
    tried = [row for row in results.found["candidates"] if row["tool"] == tool.name and "failed" not in row]
    return list(max(tried, key=lambda row: row["steady_tokens_per_s"])["settings"] if tried else tool.settings)


def limit(work: runs.Work, threads: int | None) -> dict[str, Any]:
    """Rates of matrix products, by limit.py in a process of its own with the environment of a run."""
    environment = runs.job(work, FINETUNE, threads=threads).environment() | {"OMP_WAIT_POLICY": "PASSIVE"}
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.engine.limit", "--model", work.model]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return "  FAILED: " + "\n    ".join([row["failed"], *row.get("said", [])])
    return (
        f"  {row['tokens_per_s']:.0f} tokens/s whole, {row['steady_tokens_per_s']:.0f} steady; {row['wall_s']:.0f} s, "
        f"{row['peak_mib']:.0f} MiB, last loss {row['last_loss']:.4f}, others' load {row['others_load']:.0%}"
    )


def _say(text: str) -> None:
    print(text, flush=True)
