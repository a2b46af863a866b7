"""The tools that are compared: the command of each, its best settings, and how its log is read.

All train the same adapter (LoRA on every linear layer) on the same rows with the same optimizer, rate, schedule and batch, for one epoch.
What is left to each tool is how it computes: this project runs as it does without a setting, a peer at the fastest of its candidates as
measured on the machine of the benchmark (docs/benchmarks/engine.md lists them all).
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.engine.measure import Line

ROOT = Path(__file__).parents[2]
TRL = ROOT / ".venv-trl" / "bin" / "trl"

RANK, ALPHA, BATCH, WARMUP, LEARNING_RATE = 16, 32, 8, 3, 2e-4

_PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one tool."""

    model: Path
    train: Path
    template: Path
    directory: Path
    """Empty; everything that the run writes goes here, its caches too."""
    seed: int = 0
    nf4: bool = False
    threads: int | None = None
    """None: as the tool chooses, all cores."""

    @property
    def output(self) -> Path:
        """Where the tool puts its result."""
        return self.directory / "output"

    def environment(self) -> dict[str, str]:
        """Nothing of the caller's settings of threads; empty caches."""
        found = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        found |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
        found |= {"HF_HOME": str(self.directory / "hf"), "FINETUNE_CACHE": str(self.directory / "cache")}
        return found | ({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})


def variables(settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """``settings`` as variables of the environment and options of the command."""
    named = [setting for setting in settings if re.match(r"[A-Z_]+=", setting)]
    return dict(setting.split("=", 1) for setting in named), [setting for setting in settings if setting not in named]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step as it was seen to end."""

    at_s: float
    """Seconds since the command began."""
    cpu_s: float
    """Processor seconds by then."""
    tokens: int
    """Of the step, without padding."""
    loss: float


@dataclass(frozen=True, slots=True)
class Tool:
    """How one tool is run and read."""

    name: str
    command: Callable[[Job, Sequence[str]], list[str | Path]]
    """Of a job and the tool's own settings."""
    read: Callable[[Sequence[Line]], list[Step]]
    adapter: Callable[[Job], Path]
    """Directory of the finished adapter."""
    settings: tuple[str, ...] = ()
    """Options of the command, and variables of its environment (``NAME=value``), where no candidate was measured."""
    candidates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Settings that are tried; a peer is compared at the fastest of them."""
    watched: Callable[[Job], Path | None] = lambda _: None
    """The file in which steps are seen, where it is not stdout."""


# --- this project --------------------------------------------------------------------------------------------------------------------


def _finetune_command(job: Job, settings: Sequence[str]) -> list[str | Path]:
    config = {
        "model": {"id": str(job.model)},
        "quantization": {"method": "nf4", "double_quant": True} if job.nf4 else {"method": "none"},
        "tuning": {"method": "lora", "rank": RANK, "alpha": ALPHA, "targets": "all-linear"},
        "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": 0.0},
        "schedule": {"method": "cosine", "warmup_steps": WARMUP},
        "data": {"train": [{"source": str(job.train)}]},
        "train": {"batch_size": BATCH},
        "seed": job.seed,
        "output": str(job.output),
    }
    path = job.directory / "config.yaml"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML
    return [Path(sys.executable).parent / "finetune", "train", path, *settings]


def _finetune_steps(lines: Sequence[Line]) -> list[Step]:
    rows = ((line, json.loads(line.text)) for line in lines)
    return [Step(line.at_s, line.cpu_s, row["tokens"], row["loss"]) for line, row in rows if row["kind"] == "step"]


# --- transformers and PEFT -----------------------------------------------------------------------------------------------------------


def _plain_command(job: Job, settings: Sequence[str]) -> list[str | Path]:
    fixed = {"rank": RANK, "alpha": ALPHA, "batch": BATCH, "warmup": WARMUP, "learning-rate": LEARNING_RATE, "seed": job.seed}
    places = {"model": job.model, "data": job.train, "template": job.template, "output": job.output}
    options = [part for name, value in {**fixed, **places}.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "benchmarks.engine.plain", *options, *settings, *(["--nf4"] if job.nf4 else [])]


def _plain_steps(lines: Sequence[Line]) -> list[Step]:
    rows = ((line, json.loads(line.text)) for line in lines if line.text.startswith("{"))
    return [Step(line.at_s, line.cpu_s, row["tokens"], row["loss"]) for line, row in rows]


# --- TRL -----------------------------------------------------------------------------------------------------------------------------


def _trl_command(job: Job, settings: Sequence[str]) -> list[str | Path]:
    rows = job.directory / "rows"
    rows.mkdir()
    (rows / "train.jsonl").symlink_to(job.train)
    options: dict[str, object] = {
        "model_name_or_path": job.model,
        "dataset_name": rows,
        "output_dir": job.output,
        "chat_template_path": job.template,
        "assistant_only_loss": True,
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "num_train_epochs": 1,
        "seed": job.seed,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    if job.nf4:
        options |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    return [TRL, "sft", *(part for name, value in options.items() for part in (f"--{name}", str(value))), *settings]


def _trl_steps(lines: Sequence[Line]) -> list[Step]:
    """From the dictionary that the trainer prints after each step; ``num_tokens`` counts from the start."""
    found, before = [], 0
    for line in lines:
        row = ast.literal_eval(line.text) if line.text.startswith("{") else {}
        if "num_tokens" in row and "loss" in row:  # not the summary at the end
            seen = int(float(row["num_tokens"]))
            found.append(Step(line.at_s, line.cpu_s, seen - before, float(row["loss"])))
            before = seen
    return found


_ALL_CORES = f"OMP_NUM_THREADS={os.cpu_count()}"
"""accelerate's launcher, which `trl sft` goes through, otherwise gives the process a single thread."""
_TRL_BF16 = ("--bf16", "True", "--dtype", "bfloat16")


def _trl_batch(size: int, *more: str) -> tuple[str, ...]:
    return (_ALL_CORES, *_TRL_BF16, "--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(BATCH // size), *more)


_SLEEP = "OMP_WAIT_POLICY=PASSIVE"
"""What this project sets for itself."""
_BY_LENGTH = ("--train_sampling_strategy", "group_by_length")
_PADDING_FREE = ("--padding_free", "True", "--max_length", "None")

FINETUNE = Tool(
    "finetune",
    _finetune_command,
    _finetune_steps,
    adapter=lambda job: job.output / "adapter",
    watched=lambda job: job.output / "metrics.jsonl",
    candidates={"auto": (), "fp32": ("-o", "train.precision=fp32"), "plain": ("-o", "train.kernels=plain")},
)
PLAIN = Tool(
    "transformers+PEFT",
    _plain_command,
    _plain_steps,
    adapter=lambda job: job.output,
    settings=("--grouped",),
    candidates={
        "bf16, 8 rows by length": ("--grouped",),
        "bf16, 2 x 4 rows by length": ("--grouped", "--micro", "4"),
        "bf16, 8 x 1 row": ("--micro", "1"),
        "bf16, 4 x 2 rows": ("--micro", "2"),
        "bf16, 8 rows": (),
        "bf16, 8 rows by length, threads that sleep": (_SLEEP, "--grouped"),
        "fp32, 8 rows by length": ("--grouped", "--precision", "fp32"),
    },
)
TRL_SFT = Tool(
    "TRL",
    _trl_command,
    _trl_steps,
    adapter=lambda job: job.output,
    settings=_trl_batch(8, *_BY_LENGTH),
    candidates={
        "bf16, 8 rows by length": _trl_batch(8, *_BY_LENGTH),
        "bf16, 2 x 4 rows by length": _trl_batch(4, *_BY_LENGTH),
        "bf16, 8 x 1 row": _trl_batch(1),
        "bf16, 4 x 2 rows": _trl_batch(2),
        "bf16, 8 rows without padding": _trl_batch(8, *_PADDING_FREE),
        "bf16, 8 rows by length, threads that sleep": (_SLEEP, *_trl_batch(8, *_BY_LENGTH)),
        "fp32, 8 rows by length": (_ALL_CORES, "--bf16", "False", "--dtype", "float32", "--per_device_train_batch_size", "8", *_BY_LENGTH),
    },
)
TOOLS = {tool.name: tool for tool in (FINETUNE, PLAIN, TRL_SFT)}
