"""CPU seconds of the commands that should answer at once; printed, not kept: they depend on the machine more than on the code."""

from __future__ import annotations

import resource
import subprocess
import sys

REPEATS = 7
COMMANDS = (
    ["--help"],
    ["train", "--help"],
    ["config", "check", "configs/quickstart.yaml"],
    ["plan", "configs/quickstart.yaml"],
    ["plan", "configs/medical-70b.yaml"],
)


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of ``finetune ARGUMENTS`` in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "finetune", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Print least and most of the repeats."""
    for arguments in COMMANDS:
        used = sorted(cpu_seconds(arguments) for _ in range(REPEATS))
        print(f"finetune {' '.join(arguments):<38} {used[0]:.2f} to {used[-1]:.2f} CPU s")


if __name__ == "__main__":
    main()
