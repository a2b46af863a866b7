"""Common NVIDIA GPUs: memory, speed and power as their maker states them."""

from __future__ import annotations

from dataclasses import dataclass

USABLE = 0.98
"""Of a GPU's memory; the driver keeps the rest (an 80 GB H100 offers 79.1 GiB, an H200 139.8)."""

_SAME = frozenset({"NVIDIA", "GeForce", "80GB", "SXM4", "SXM5", "HBM3", "HBM3e"})
"""Words that a driver adds to the name of a listed board. With any other (`Ti`, `D`, `Laptop`, `NVL`, `MIG`) it is another one, of another
rate. A PCIe board too is one of its own, but for the A100, whose chip has the same rate there."""
_ALSO = {"A100": frozenset({"PCIe", "PCIE"})}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Figures are of its data sheet or its architecture's white paper; many are sold in variants that differ."""

    name: str
    gib: float
    """Memory as the driver counts it."""
    tflops: float
    """Matrix products in bf16 with sums in fp32, without sparsity."""
    watts: int
    """Most that the board draws."""
    source: str

    @property
    def usable_bytes(self) -> int:
        """Memory that a process can get."""
        return int(USABLE * self.gib * 2**30)


GPUS = (
    Gpu("RTX 3090", 24, 71, 350, "NVIDIA Ampere GA102 white paper"),
    Gpu("RTX 4090", 24, 165, 450, "NVIDIA Ada white paper"),
    Gpu("L4", 22.5, 121, 72, "NVIDIA L4 data sheet"),
    Gpu("RTX 5090", 32, 209, 575, "NVIDIA RTX Blackwell white paper"),
    Gpu("A100 40GB", 40, 312, 400, "NVIDIA A100 data sheet"),
    Gpu("A40", 45, 150, 300, "NVIDIA A40 data sheet"),
    Gpu("RTX A6000", 48, 155, 300, "NVIDIA Ampere GA102 white paper"),
    Gpu("L40S", 45, 362, 350, "NVIDIA L40S data sheet"),
    Gpu("A100 80GB", 80, 312, 400, "NVIDIA A100 data sheet"),
    Gpu("H100", 80, 989, 700, "NVIDIA H100 data sheet, SXM"),
    Gpu("H200", 140.4, 989, 700, "NVIDIA H200 data sheet"),
    Gpu("B200", 179, 2250, 1000, "NVIDIA Blackwell data sheet"),
)
"""By memory, then by speed."""

BY_SIZE = {24: "RTX 4090", 32: "RTX 5090", 40: "A100 40GB", 48: "RTX A6000", 80: "H100", 141: "H200", 180: "B200"}
"""The GPU that is meant by a number of gigabytes."""


def called(name: str) -> Gpu | None:
    """The listed GPU that a driver calls ``name``, such as `NVIDIA H100 80GB HBM3`; None for a board that is not listed."""
    words = set(name.replace("-", " ").split())
    fitting = [gpu for gpu in GPUS if _is_one(set(gpu.name.split()), words)]
    return max(fitting, key=lambda gpu: len(gpu.name), default=None)


def _is_one(listed: set[str], words: set[str]) -> bool:
    family = next((also for word, also in _ALSO.items() if word in listed), frozenset())
    return listed <= words <= listed | _SAME | family


def gpu_of(name: str) -> Gpu:
    """By its name; KeyError for one that is not listed."""
    return {gpu.name: gpu for gpu in GPUS}[name]
