"""The page of `benchmarks.plan`."""

from __future__ import annotations

from typing import Any

BAR = 0.10
"""Largest relative error that counts as right."""


def markdown(found: dict[str, Any]) -> str:
    """The figures as a page."""
    lines = ["# Memory: the plan against the process", "", "Written by `make bench-plan` ([what is compared](../../benchmarks/plan.py))."]
    lines += ["", "## SmolLM2-135M on a CPU", "", *(_cpu_lines(found["cpu"]) if found.get("cpu") else ["Not measured."])]
    lines += ["", "## NVIDIA GPU", "", *(_gpu_lines(found["gpu"]) if found.get("gpu") else ["Not measured."])]
    return "\n".join(lines) + "\n"


def _cpu_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Own memory against the plan's, and what is not compared beside them."""
    lines = [
        "Own memory is what the kernel cannot take back: anonymous and shared pages of the process (RssAnon + RssShmem), read every 10 ms;",
        "the most of the whole command counts, and a peak of less than 10 ms may be missed. Pages of files are left out on both sides:",
        "shared libraries, and weights that are computed with as they lie in the model's file (an unquantized base, embeddings). The",
        "kernel takes them back and reads them again as it likes. The last two columns have them, and are not compared.",
        "",
        f"{len(rows[0]['measured_each'])} processes for each run, {rows[0]['threads']} threads; MiB.",
        "",
        "| run | own, predicted | own, measured (median) | of all processes | error | total of the plan | resident (median) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = (row["predicted"], row["measured"], min(row["measured_each"]), max(row["measured_each"]))
        predicted, median, least, most, total, resident = map(mebibytes, (*sizes, row["predicted_total"], row["resident"]))
        lines.append(f"| {row['case']} | {predicted} | {median} | {least} to {most} | {row['error']:+.1%} | {total} | {resident} |")
    return [*lines, "", f"{_largest(rows)} The largest of a single process: {_largest_of_one(rows):.1%}."]


def _gpu_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What torch's allocator handed out against the plan's."""
    lines = ["| run | predicted MiB | measured MiB | error |", "|---|---|---|---|"]
    lines += [f"| {row['case']} | {mebibytes(row['predicted'])} | {mebibytes(row['measured'])} | {row['error']:+.1%} |" for row in rows]
    return [*lines, "", _largest(rows)]


def mebibytes(size: float) -> str:
    """``size`` bytes, for people."""
    return f"{size / 2**20:,.0f}"


def _largest(rows: list[dict[str, Any]]) -> str:
    return f"Largest error {max(abs(row['error']) for row in rows):.1%}; the bar is {BAR:.0%}."


def _largest_of_one(rows: list[dict[str, Any]]) -> float:
    return float(max(abs(row["predicted"] / each - 1) for row in rows for each in row["measured_each"]))
