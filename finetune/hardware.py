"""What this machine has."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

_RECORDED = ("finetune", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors")
_PATIENCE_S = 5.0
"""For NVIDIA's tool, which takes a second where the driver sleeps."""
_BF16_CAPABILITY = 8.0
"""Of NVIDIA GPUs that multiply bf16 matrices: Ampere and later."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices that this process can use."""

    kind: Literal["cpu", "cuda"]
    name: str
    devices: int
    memory_bytes: int
    """Of one device; of the host for a CPU."""
    bf16: bool
    """Whether bf16 matrix products are fast here."""

    def describe(self) -> str:
        """One line for people."""
        unit = "GPU" if self.kind == "cuda" else "core"
        return f"{self.name}, {self.devices} {unit}{'s' * (self.devices != 1)}, {self.memory_bytes / 2**30:.0f} GiB"


def detect() -> Machine:
    """The machine as torch sees it (loads torch)."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Machine(
            "cuda",
            properties.name,
            torch.cuda.device_count(),
            properties.total_memory,
            torch.cuda.is_bf16_supported(including_emulation=False),
        )
    return Machine("cpu", _cpu_name(), os.cpu_count() or 1, host_memory(), _cpu_has_bf16())


def survey() -> Machine:
    """The machine as its driver and kernel tell of it, without torch: at once, and as good as `detect` for a plan."""
    found = _visible(_nvidia())
    if found:
        name, mebibytes, capability = found[0]
        return Machine("cuda", name, len(found), int(mebibytes) * 2**20, bf16=float(capability) >= _BF16_CAPABILITY)
    return Machine("cpu", _cpu_name(), os.cpu_count() or 1, host_memory(), _cpu_has_bf16())


def _nvidia() -> list[tuple[str, ...]]:
    """(name, MiB, compute capability) of every GPU that NVIDIA's tool lists; none where there is no such tool or it finds no driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [tuple(field.strip() for field in line.split(",")) for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == 3 and row[1].isdigit() and re.fullmatch(r"\d+\.\d+", row[2])]


def _visible(gpus: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Those that CUDA_VISIBLE_DEVICES leaves: by number; of names, of which the tool's list knows nothing, as many as are named."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    parts = [part.strip() for part in chosen.split(",")]
    if any(part.startswith(("GPU-", "MIG-")) for part in parts):
        return gpus[: len(parts)]
    return [gpus[int(part)] for part in parts if part.isdigit() and int(part) < len(gpus)]


def crowd_size() -> tuple[int, int]:
    """(processes that train together, those of them on this machine), as the launcher has told this one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return world, min(world, int(os.environ.get("LOCAL_WORLD_SIZE", str(world))))


STARTED_HERE = "FINETUNE_WORKERS"
"""Variable that tells a worker that `finetune train` itself started it, and how many there are."""


def adopt_srun() -> None:
    """Translate what ``srun`` tells a task into what torch reads, where no other launcher has. One task a device.

    A task is known by SLURM_STEP_NUM_TASKS: in a batch script itself SLURM_PROCID is set too, and would make it wait for nobody.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks < 2 or "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
        return
    here = os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)).split(",")[0].split("(")[0]
    found = {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": here,
        "MASTER_ADDR": _first_host(os.environ.get("SLURM_STEP_NODELIST", "")),
        # the same for all tasks of a step, another for each step: two runs may share a node
        "MASTER_PORT": str(20000 + (37 * int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))) % 20000),
    }
    for name, value in found.items():
        os.environ.setdefault(name, value)


def _first_host(nodes: str) -> str:
    """``gpu[03-06,09],big1`` -> ``gpu03``; this machine where no node is named."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    return (match[1] + (match[2] or "") + match[3]) if match else "127.0.0.1"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _cpu_name() -> str:
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_has_bf16() -> bool:
    return any(flag in _cpuinfo() for flag in ("avx512_bf16", "amx_bf16"))


def host_memory() -> int:
    """Bytes of RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes of RAM that programs can still get, what the kernel caches included."""
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="ascii").splitlines() if path.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def swap_memory() -> int:
    """Bytes of disk that the kernel may use as RAM; 0 where it does not say."""
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="ascii").splitlines() if path.is_file() else ():
        if line.startswith("SwapTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_memory() -> int:
    """The most bytes of RAM that this process has had so far (not those of a process that it was started from)."""
    path = Path("/proc/self/status")
    for line in path.read_text(encoding="ascii", errors="replace").splitlines() if path.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment() -> dict[str, Any]:
    """What environment.json says of the machine and its libraries."""
    return {"machine": asdict(detect()), "system": platform.platform(), "versions": versions()}
