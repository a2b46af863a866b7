"""What was planned beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.reporting.record import Record
from finetune.reporting.tables import measure
from finetune.reporting.wording import NOTHING, duration, gibibytes, number, percent


@dataclass(frozen=True, slots=True)
class Planned:
    """One quantity that was foretold and came true, more or less."""

    name: str
    planned: str
    measured: str
    note: str = ""


def expected(record: Record) -> dict[str, float]:
    """`tokens_per_second` and `memory_bytes` as the run's plan foretold them, where it did; for lines beside the measured ones."""
    plan = _plan(record)
    found = {"tokens_per_second": (plan.get("speed") or {}).get("tokens_per_second"), "memory_bytes": _memory(plan)}
    return {name: float(value) for name, value in found.items() if value}


def plan_rows(record: Record) -> list[Planned]:
    """Each planned quantity with what was measured; quantities that neither plan nor rows have are left out."""
    plan, came = _plan(record), measure(record)
    steps = record.plan.get("steps", {}).get("total")
    speed, cost, parameters = plan.get("speed") or {}, plan.get("cost") or {}, plan.get("parameters") or {}
    groups = record.plan.get("groups", ())
    trainable = sum(group["parameters"] for group in groups) if groups else None
    rows = [
        Planned("optimizer steps", number(steps), number(came.steps if record.steps else None)),
        Planned("tokens", number(_tokens(record, plan)), number(came.tokens if record.steps else None), _shortened(record)),
        Planned("supervised tokens", NOTHING, number(came.supervised)),
        Planned("trainable parameters", number(parameters.get("trainable")), number(trainable)),
        Planned("memory of a device", gibibytes(_memory(plan)), gibibytes(came.memory_bytes), _off(_memory(plan), came.memory_bytes)),
        Planned(
            "tokens a second",
            number(speed.get("tokens_per_second")),
            number(came.tokens_per_second),
            _joined(speed.get("origin"), speed.get("reason"), _off(speed.get("tokens_per_second"), came.tokens_per_second)),
        ),
        Planned("time in steps", duration(cost.get("seconds")), duration(came.seconds if record.steps else None)),
        Planned("energy", _energy(cost.get("kilowatt_hours")), NOTHING),
        Planned("waiting for rows", NOTHING, percent(came.input_share), "of the time in steps"),
    ]
    return [row for row in rows if row.planned != NOTHING or row.measured != NOTHING]


def memory_parts(record: Record) -> list[tuple[str, str]]:
    """The parts of the memory that was planned."""
    parts: Mapping[str, int] = _plan(record).get("memory_bytes_by_part") or {}
    return [(name, gibibytes(count)) for name, count in parts.items() if count]


def _plan(record: Record) -> Mapping[str, Any]:
    return record.plan.get("plan") or {}


def _memory(plan: Mapping[str, Any]) -> int | None:
    return sum((plan.get("memory_bytes_by_part") or {}).values()) or None


def _tokens(record: Record, plan: Mapping[str, Any]) -> int | None:
    """Of the plan, or else as many as the prepared rows of the run have in all of its steps."""
    length: Mapping[str, Any] = plan.get("length") or {}
    steps, rows = record.plan.get("steps") or {}, (record.plan.get("data") or {}).get("train") or {}
    if length.get("tokens"):
        return int(length["tokens"])
    return round(rows["tokens"] * steps["total"] / steps["per_epoch"]) if steps.get("per_epoch") and "tokens" in rows else None


def _shortened(record: Record) -> str:
    early = record.result is not None and record.result.get("stopped_early")
    return "stopped early" if early else ""


def _off(planned: float | None, measured: float | None) -> str:
    """How far what was measured is from the plan."""
    return f"{measured / planned - 1:+.0%}" if planned and measured else ""


def _energy(kilowatt_hours: float | None) -> str:
    return NOTHING if kilowatt_hours is None else f"{number(kilowatt_hours)} kWh"


def _joined(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)
