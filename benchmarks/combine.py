"""Two adapters of different chapters of ICD-10-CM, combined each way: what is left of either, and of general English.

Run with `make bench-combine`; writes docs/benchmarks/combine.json and prints the table for the lab log. Both adapters are LoRA r=16 on
all linear layers of SmolLM2-135M in bf16, trained on 24 facts of one chapter each; runs that are there already are used again.

Losses are nats a supervised token: of each run's validation rows, of the answers to questions about each run's trained facts in a wording
that no row has, and of general text. Everything is computed as the runs computed: bf16 under autocast.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finetune import api
from finetune.config.schema import Icd10cm, NoQuantization
from finetune.data.formats import Message
from finetune.data.general import general_text
from finetune.data.icd10cm_questions import questions
from finetune.data.render import Example, Renderer
from finetune.data.stored import load_rows
from finetune.evaluation.choices import Item, judge
from finetune.model.builtin import BUILTIN, resolve_model
from finetune.model.load import load_base, load_tokenizer
from finetune.scoring import Scorer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "combine.json"
CHAPTERS = ("A", "K")
"""Infections; diseases of the digestive system."""
_BLOCK = 512
CPU = torch.device("cpu")

ARMS: dict[str, dict[str, Any]] = {
    "adapter A alone": {"method": "task-arithmetic", "weights": (1.0, None)},
    "adapter K alone": {"method": "task-arithmetic", "weights": (None, 1.0)},
    "average": {"method": "average", "weights": (None, None)},
    "task arithmetic, 1 and 1": {"method": "task-arithmetic", "weights": (1.0, 1.0)},
    "the same at rank 16": {"method": "task-arithmetic", "weights": (1.0, 1.0), "output": {"kind": "adapter", "rank": 16}},
    "task arithmetic, 1 and -0.5": {"method": "task-arithmetic", "weights": (1.0, -0.5)},
    "TIES, 20 % of the update": {"method": "ties", "weights": (1.0, 1.0), "density": 0.2},
    "TIES, 20 % of each weight": {"method": "ties", "weights": (1.0, 1.0), "density": 0.2, "trim": "tensor"},
    "magnitude pruning, 20 %": {"method": "magnitude-prune", "weights": (1.0, 1.0), "density": 0.2},
    "DARE, 50 % kept": {"method": "dare-linear", "weights": (1.0, 1.0), "density": 0.5},
    "DARE with TIES, 50 % kept": {"method": "dare-ties", "weights": (1.0, 1.0), "density": 0.5},
}


def source(chapter: str) -> dict[str, Any]:
    """The facts of a chapter."""
    return {"source": "builtin:icd10cm", "chapters": [chapter], "document_facts": 12, "question_facts": 12, "control_facts": 8}


def train(chapter: str, folder: Path) -> Path:
    """The run of ``chapter``, trained unless it is there."""
    run = folder / f"chapter-{chapter}"
    if not (run / "adapter" / "MANIFEST.json").is_file():
        overrides = {
            "quantization.method": "none",
            "data.train": json.dumps([source(chapter)]),
            "data.validation.fraction": "0.15",
            "train.precision": "bf16",
            "output": str(run),
        }
        given = [part for key, value in overrides.items() for part in ("-o", f"{key}={value}")]
        subprocess.run([sys.executable, "-m", "finetune", "train", str(ROOT / "configs" / "quickstart.yaml"), *given], check=True)
    return run


def plan(arm: dict[str, Any], runs: list[Path]) -> dict[str, Any]:
    """The plan of an arm; a weight None leaves an adapter out, except in an average."""
    fields = {key: value for key, value in arm.items() if key != "weights"}
    if arm["method"] == "average":
        return {**fields, "adapters": [{"path": str(run)} for run in runs]}
    pairs = zip(runs, arm["weights"], strict=True)
    return {
        "output": {"kind": "model", "dtype": "bf16"},
        **fields,
        "adapters": [{"path": str(run), "weight": weight} for run, weight in pairs if weight is not None],
    }


def losses(model: Any, renderer: Renderer, runs: list[Path]) -> dict[str, float]:
    """Every figure of one model."""
    scorer = Scorer(model, CPU, "bf16", _BLOCK)
    found = {}
    for chapter, run in zip(CHAPTERS, runs, strict=True):
        rows, _ = load_rows(run / "rows.safetensors")
        found[f"{chapter}: validation rows"] = scorer.mean_loss(rows)
        asked = [question for question in questions(Icd10cm(**source(chapter)), 1) if question.fact.arm != "control"]
        items = [
            Item(tuple(Message(turn["role"], turn["content"]) for turn in question.prompt), (question.answer,), question.answer)
            for question in asked
        ]
        judged = judge(scorer, renderer, items, lambda _: None)
        found[f"{chapter}: answers"] = sum(one.answer_loss for one in judged) / sum(one.answer_tokens for one in judged)
    ids = tuple(renderer.tokenizer(general_text(), add_special_tokens=False).input_ids)
    pieces = [ids[start : start + _BLOCK] for start in range(0, len(ids) - 1, _BLOCK)]
    found["general text"] = scorer.mean_loss([Example(piece, (False, *(True for _ in piece[1:])), "general text") for piece in pieces])
    return found


def loaded(directory: Path, base: Path) -> Any:
    """The model that an arm wrote, or the base with the adapter that it wrote."""
    if not (directory / "adapter_config.json").is_file():
        return load_base(directory, NoQuantization(method="none"), torch.bfloat16, CPU)
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(base, NoQuantization(method="none"), torch.bfloat16, CPU), directory)


def measured(runs: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Base and arms, one after the other."""
    base = resolve_model(BUILTIN)
    renderer = Renderer(load_tokenizer(base))
    yield "base", {"losses": losses(loaded(base, base), renderer, runs)}
    for name, arm in ARMS.items():
        with tempfile.TemporaryDirectory() as folder:
            file, destination = Path(folder, "plan.yaml"), Path(folder, "combined")
            file.write_text(json.dumps(plan(arm, runs)))
            begun = time.perf_counter()
            report = api.combine(file, destination)
            seconds = time.perf_counter() - begun
            error = report.adapter.error if report.adapter else None
            yield name, {"losses": losses(loaded(destination, base), renderer, runs), "seconds": seconds, "svd_error": error}


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


def table(arms: dict[str, Any]) -> str:
    """The results as Markdown."""
    columns = list(arms["base"]["losses"])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, found in arms.items():
        cells = [f"{found['losses'][column]:.3f}" for column in columns]
        note = f" (relative error {found['svd_error']:.2f})" if found.get("svd_error") is not None else ""
        lines.append(f"| {name}{note} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, combine, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "combine", help="where the two runs lie")
    folder = parser.parse_args().runs
    runs = [train(chapter, folder) for chapter in CHAPTERS]
    results: dict[str, Any] = {"machine": machine(), "model": BUILTIN, "chapters": CHAPTERS, "arms": {}}
    for name, found in measured(runs):
        results["arms"][name] = found
        print(f"{name}: {', '.join(f'{key} {value:.3f}' for key, value in found['losses'].items())}", flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results["arms"]))


if __name__ == "__main__":
    main()
