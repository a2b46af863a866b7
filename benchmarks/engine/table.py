"""What the results say: medians with their spread, ratios to the fastest peer, and which floors hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from benchmarks.engine.limit import Shape, limit, operations
from benchmarks.engine.tools import FINETUNE, RANK, TOOLS

LORA, LORA_FP32, NF4 = "LoRA", "LoRA in fp32", "NF4"
"""What is measured. LoRA is in bf16 where the machine has it; in fp32 besides, alone and against the limit of that type."""
SPEED_FLOOR, LOSS_FLOOR, LIMIT_FLOOR = 2.0, 0.01, 0.6
BUSY = 0.05
"""Share of the cores that others used, above which a run's times are not to be trusted."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most of one figure over the rounds."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values))

    def text(self, digits: int = 0) -> str:
        """``median (least to most)``, the median alone where all are shown the same."""
        middle, low, high = (f"{value:,.{digits}f}" for value in (self.middle, self.low, self.high))
        return middle if low == high else f"{middle} ({low} to {high})"


@dataclass(frozen=True, slots=True)
class Floor:
    """A promise, and what was measured of it."""

    promise: str
    measured: str
    holds: bool | None
    """None: not measured."""

    @property
    def verdict(self) -> str:
        """In words."""
        return "not measured" if self.holds is None else "holds" if self.holds else "does not hold"


Rows = list[dict[str, Any]]


def of(runs: Rows, variant: str, tool: str) -> Rows:
    """The finished runs of one tool."""
    return [run for run in runs if run["variant"] == variant and run["tool"] == tool and "failed" not in run]


def ratios(runs: Rows, variant: str, figure: str) -> list[float]:
    """This project over the fastest peer, for each round in which both came to the end."""
    found = []
    for own in of(runs, variant, FINETUNE.name):
        peers = [run[figure] for name in TOOLS if name != FINETUNE.name for run in of(runs, variant, name) if run["round"] == own["round"]]
        if peers:
            found.append(own[figure] / max(peers))
    return found


def fractions(results: dict[str, Any], variant: str, *, cpu: bool = False) -> list[float]:
    """Steady state over the machine's limit, for each round; ``cpu``: both by processor seconds, which other work disturbs less."""
    parts = operations(Shape.of(results["model"]), RANK, results["data"][variant]["train"]) if variant in results.get("data", {}) else {}
    precision = "bf16" if results["machine"]["bf16"] and variant != LORA_FP32 else "fp32"
    kind = "_cpu" if cpu else ""
    found = []
    for own in of(results["runs"], variant, FINETUNE.name):
        limits = [each[precision] for each in results["limits"] if (each["round"], each["variant"]) == (own["round"], variant)]
        if limits:
            rates = {part: mean(each[part + kind]["median"] for each in limits) for part in ("layers", "head")}
            tokens = results["data"][variant]["train"]["tokens"]
            found.append(own["steady_tokens_per_cpu_s" if cpu else "steady_tokens_per_s"] / limit(parts, rates, tokens))
    return found


def floors(results: dict[str, Any]) -> list[Floor]:
    """All of them, in the order of the issue."""
    runs = results["runs"]
    found = [
        _at_least(f"{variant}, {name}: at least {SPEED_FLOOR:g}x the fastest peer", ratios(runs, variant, figure), SPEED_FLOOR)
        for variant in (LORA, NF4)
        for name, figure in (("whole command", "tokens_per_s"), ("steady state", "steady_tokens_per_s"))
    ]
    found += [_same_loss(runs, variant) for variant in (LORA, NF4)]
    found += [_leanest(runs, variant) for variant in (LORA, NF4)]
    return [*found, _near_limit(results)]


def _at_least(promise: str, values: list[float], floor: float) -> Floor:
    if not values:
        return Floor(promise, "-", None)
    spread = Spread.of(values)
    return Floor(promise, spread.text(2), spread.middle >= floor)


def _near_limit(results: dict[str, Any]) -> Floor:
    promise = f"LoRA in bf16 or fp32, steady state: at least {LIMIT_FLOOR:.0%} of the machine's limit in that type"
    usual = "bf16" if results["machine"]["bf16"] else "fp32"
    values = {name: found for name, variant in ((usual, LORA), ("fp32", LORA_FP32)) if (found := fractions(results, variant))}
    spreads = {name: Spread.of(found) for name, found in values.items()}
    if not spreads:
        return Floor(promise, "-", None)
    measured = ", ".join(f"{name} {spread.text(2)}" for name, spread in spreads.items())
    return Floor(promise, measured, max(spread.middle for spread in spreads.values()) >= LIMIT_FLOOR)


def _peers(runs: Rows, variant: str, figure: str) -> dict[str, float]:
    """Median of each peer."""
    members = {name: of(runs, variant, name) for name in TOOLS if name != FINETUNE.name}
    return {name: median(run[figure] for run in rows) for name, rows in members.items() if rows}


def _same_loss(runs: Rows, variant: str) -> Floor:
    promise = f"{variant}: validation loss at most {LOSS_FLOOR} nats above the lowest peer's"
    own, peers = of(runs, variant, FINETUNE.name), _peers(runs, variant, "validation_loss")
    if not own or not peers:
        return Floor(promise, "-", None)
    above = Spread.of([run["validation_loss"] for run in own]).middle - min(peers.values())
    return Floor(promise, f"{above:+.4f}", above <= LOSS_FLOOR)


def _leanest(runs: Rows, variant: str) -> Floor:
    promise = f"{variant}: peak memory not above the leanest peer's"
    own, peers = of(runs, variant, FINETUNE.name), _peers(runs, variant, "peak_mib")
    if not own or not peers:
        return Floor(promise, "-", None)
    middle, least = median(run["peak_mib"] for run in own), min(peers.values())
    return Floor(promise, f"{middle:,.0f} MiB against {least:,.0f}", middle <= least)


# --- as text -------------------------------------------------------------------------------------------------------------------------

_COLUMNS = (
    ("whole command, tokens/s", "tokens_per_s", 0),
    ("of them supervised", "supervised_tokens_per_s", 0),
    ("steady state, tokens/s", "steady_tokens_per_s", 0),
    ("of them supervised", "steady_supervised_tokens_per_s", 0),
    ("wall, s", "wall_s", 0),
    ("processor, s", "cpu_s", 0),
    ("steady tokens a processor second", "steady_tokens_per_cpu_s", 0),
    ("peak MiB", "peak_mib", 0),
    ("validation loss", "validation_loss", 4),
)


def markdown(results: dict[str, Any]) -> str:
    """The page docs/benchmarks/engine.md."""
    machine, versions = results["machine"], results["versions"]
    lines = [
        "# The training engine against its peers",
        "",
        "Written by `make bench` from engine.json. Median over the rounds (least to most). Every run is a whole command in a fresh",
        "process, its caches empty: start-up, preparation of the data, one epoch, the adapter saved. LoRA r=16 on every linear layer,",
        "AdamW, cosine, 8 rows a step, loss on the assistant's words only, the same rows for all. Tokens are those of the rows, without",
        "padding; steady state leaves out the first tenth of the steps. One script takes every validation loss, in fp32 (score.py).",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB. Model: {results['model']['name']}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
    ]
    for variant in (LORA, LORA_FP32, NF4):
        lines += _variant(results, variant)
    lines += ["", "## Floors", "", "| floor | measured | |", "|---|---|---|"]
    lines += [f"| {floor.promise} | {floor.measured} | {floor.verdict} |" for floor in floors(results)]
    lines += _candidates(results["candidates"])
    return "\n".join([*lines, *_gpu(results.get("gpu"))]) + "\n"


def _gpu(found: dict[str, Any] | None) -> list[str]:
    lines = ["", "## On an NVIDIA GPU", ""]
    if not found:
        return [*lines, "Not measured: `make bench-gpu` needs a GPU, and there was none."]
    lines.append(f"{found['device']}, torch {found['torch']}; random weights.")
    if "70b" in found:
        peak = found["70b"]["peak_allocated"] / 2**30, found["70b"]["peak_reserved"] / 2**30
        lines += [
            "",
            f"70B in NF4, LoRA r=64, one example of {found['70b']['tokens']:,} tokens: peak {peak[0]:.1f} GiB, {peak[1]:.1f} reserved.",
        ]
    for row in found.get("8b", []):
        said = (
            f"failed: {row['failed']}"
            if "failed" in row
            else f"{row['tokens_per_s']:.0f} tokens/s whole, {row['steady_tokens_per_s']:.0f} steady"
        )
        lines += ["", f"8B, {row['variant']}, {row['tool']}, round {row['round'] + 1}: {said}."]
    return lines


def _variant(results: dict[str, Any], variant: str) -> list[str]:
    runs = [run for run in results["runs"] if run["variant"] == variant]
    if not runs or variant not in results["data"]:  # of other rows, before it was measured on these
        return ["", f"## {variant}", "", "Not measured."]
    totals = results["data"][variant]["train"]
    members = {name: of(runs, variant, name) for name in ([FINETUNE.name] if variant == LORA_FP32 else TOOLS)}
    lines = [
        "",
        f"## {variant}",
        "",
        f"{totals['rows']} rows, {totals['tokens']:,} tokens, {totals['supervised_tokens']:,} of them supervised; "
        f"rows of {totals['shortest']} to {totals['longest']} tokens, median {totals['median']}.",
        "",
        "| | " + " | ".join(members) + " |",
        "|---" * (len(members) + 1) + "|",
    ]
    for title, figure, digits in _COLUMNS:
        cells = [Spread.of([run[figure] for run in rows]).text(digits) if rows else "-" for rows in members.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines.append("| rounds | " + " | ".join(str(len(rows)) for rows in members.values()) + " |")
    lines += _notes(results, variant)
    return lines


def _notes(results: dict[str, Any], variant: str) -> list[str]:
    runs = [run for run in results["runs"] if run["variant"] == variant]
    to_peers = (
        []
        if variant == LORA_FP32
        else [
            ("Whole command, this project over the fastest peer", ratios(runs, variant, "tokens_per_s")),
            ("Steady state, likewise", ratios(runs, variant, "steady_tokens_per_s")),
            ("Steady state by processor seconds, likewise", ratios(runs, variant, "steady_tokens_per_cpu_s")),
        ]
    )
    to_limit = [
        ("Steady state over the machine's limit", fractions(results, variant)),
        ("The same by processor seconds", fractions(results, variant, cpu=True)),
    ]
    lines = [""]
    for name, values in (*to_peers, *to_limit):
        lines.append(f"{name}: {Spread.of(values).text(2) if values else 'not measured'}.  ")
    for run in runs:
        if "failed" in run:
            lines.append(f"**{run['tool']} failed in round {run['round'] + 1}: {run['failed']}.**  ")
    busy = max((run["others_load"] for run in runs if "failed" not in run), default=0.0)
    if busy > BUSY:
        lines.append(f"**Other processes used up to {busy:.0%} of the cores meanwhile: times are not to be trusted.**  ")
    return lines


def _candidates(rows: Rows) -> list[str]:
    if not rows:
        return []
    lines = ["", "## Settings that were tried", "", "LoRA. A peer was compared at its fastest (steady state, wall time), with NF4 too.", ""]
    lines += ["| tool | setting | rows | steady tokens/s | a processor second | peak MiB | last loss |", "|---" * 7 + "|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['tool']} | {row['setting']} | failed: {row['failed']} | | | | |")
        else:
            speeds = f"{row['steady_tokens_per_s']:.0f} | {row['steady_tokens_per_cpu_s']:.0f}"
            lines.append(
                f"| {row['tool']} | {row['setting']} | {row['rows']} | {speeds} | {row['peak_mib']:,.0f} | {row['last_loss']:.4f} |"
            )
    return lines
