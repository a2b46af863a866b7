"""What the rules look at: everything a run left on disk, read once and typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.config.schema import Config
from finetune.data.report import DataReport
from finetune.errors import ConfigError, VerificationError
from finetune.planning.config_json import cached_copy, read_config
from finetune.reporting.doctor.findings import State
from finetune.runs import RunDirectory
from finetune.sealed import read_json

_BUILTIN_CONTEXT = 8192
"""Of SmolLM2-135M (its config.json: max_position_embeddings)."""


@dataclass(frozen=True, slots=True, eq=False)  # hashed by identity: `course` is asked for by many rules
class Step:
    """One optimizer step, as metrics.jsonl has it."""

    step: int
    loss: float
    """Nats a supervised token."""
    grad_norm: float
    """Before clipping."""
    rates: Mapping[str, float]
    """Learning rate by group."""
    tokens: int
    supervised: int
    seconds: float
    memory_bytes: int | None
    """Peak of the process so far; None in runs of older versions."""
    input_seconds: float | None
    """Time spent waiting for rows; None in runs of older versions."""

    @property
    def rate(self) -> float:
        """The largest learning rate of the step."""
        return max(self.rates.values())


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Validation loss after a step."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a learning rate."""

    name: str
    learning_rate: float
    """Peak."""


@dataclass(frozen=True, slots=True)
class Device:
    """What the run trained on."""

    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    name: str = ""
    devices: int = 1
    """Of one machine; cores of a CPU."""
    bf16: bool = True
    """Whether bf16 matrix products are fast there."""
    processes: int = 1
    """That trained together, in the last session."""


@dataclass(frozen=True, slots=True)
class Module:
    """What training did to one weight, as far as the adapter's factors tell."""

    name: str
    role: str
    """`attention`, `mlp`, or another of `optimizer.groups`; the last part of the name where it has none."""
    rank: int
    """Directions that could train."""
    effective_rank: float
    """exp of the entropy of the normalized singular values of the update (Roy & Vetterli 2007)."""
    size: float
    """Root mean square of the elements of the update."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A mean over supervised tokens and its standard error, rows being the units."""

    mean: float
    error: float


@dataclass(frozen=True, slots=True)
class Drift:
    """The model on validation rows and on newer rows."""

    source: str
    """The newer data, as an absolute path."""
    validation_rows: int
    newer_rows: int
    validation: Loss
    newer: Loss
    validation_gain: Loss
    """Loss of the base minus that of the tuned model on the same rows."""
    newer_gain: Loss


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of a run. A string in place of evidence says why it is missing."""

    run: str
    config: Config
    state: State
    failure: str | None
    """Name of the error that ended the last session, such as `DivergedError`."""
    planned_steps: int
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    groups: tuple[Group, ...]
    data: DataReport
    device: Device
    tokens_per_device: int
    checkpointing: bool | Literal["offload"]
    """Whether activations were recomputed; ``offload``: from hidden states in host memory."""
    figures: tuple[Mapping[str, Any], ...] | str
    """Of the last evaluation: name, unit, n, values by system, better; since version 0.2 intervals and changes."""
    modules: tuple[Module, ...] | str
    drift: Drift | str
    context: int | None = None
    """Tokens that the model reads at most; None where its config.json is not here, or does not say."""
    unreadable: tuple[int, ...] = ()
    """Lines of metrics.jsonl that are no row, the last one aside, which a kill may have torn."""


def gather(run: RunDirectory, config: Config, modules: Sequence[Module] | str, drift: Drift | str) -> Evidence:
    """Everything that ``run`` holds, with what was measured of its weights. VerificationError where a file is damaged."""
    plan, records = read_json(run.plan), read_json(run.environment)
    try:
        return _typed(run, config, (plan, records), (modules, drift))
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError(
            f"a file of the run is damaged: {error!r}", where=str(run.path), fix="restore it, or train again"
        ) from error


def _typed(
    run: RunDirectory,
    config: Config,
    records: tuple[Mapping[str, Any], Mapping[str, Any]],
    measured: tuple[Sequence[Module] | str, Drift | str],
) -> Evidence:
    plan, environment = records
    rows, unreadable = run.readable_rows()
    failure = environment["sessions"][-1].get("failed")
    finished = run.is_finished()
    modules, drift = measured
    return Evidence(
        run=str(run.path),
        config=config,
        state="finished" if finished else "failed" if failure else "unfinished",
        failure=failure["error"] if failure and not finished else None,
        planned_steps=int(plan["steps"]["total"]),
        steps=tuple(_step(row) for row in rows if row["kind"] == "step"),
        evaluations=tuple(Evaluation(row["step"], row["validation_loss"]) for row in rows if row["kind"] == "evaluation"),
        groups=tuple(Group(group["name"], group["learning_rate"]) for group in plan["groups"]),
        data=DataReport.from_dict(plan["data"]),
        device=_device(environment),
        tokens_per_device=int(plan["resolved"]["tokens_per_device"]["value"]),
        checkpointing=plan["resolved"]["gradient_checkpointing"]["value"],
        figures=_figures(run),
        modules=modules if isinstance(modules, str) else tuple(modules),
        drift=drift,
        context=_context(config),
        unreadable=tuple(unreadable),
    )


def _device(environment: Mapping[str, Any]) -> Device:
    machine, session = environment["machine"], environment["sessions"][-1]
    name, devices, bf16 = (machine.get(key, default) for key, default in (("name", ""), ("devices", 1), ("bf16", True)))
    return Device(machine["kind"], machine["memory_bytes"], name, devices, bf16, session.get("devices", 1))


def _step(row: Mapping[str, Any]) -> Step:
    return Step(
        step=row["step"],
        loss=row["loss"],
        grad_norm=row["grad_norm"],
        rates=row["learning_rates"],
        tokens=row["tokens"],
        supervised=row["supervised_tokens"],
        seconds=row["seconds"],
        memory_bytes=row.get("memory_bytes"),
        input_seconds=row.get("input_seconds"),
    )


def _context(config: Config) -> int | None:
    """Of the config.json of a local model, or of one in the hub's cache."""
    if config.model.id.startswith("builtin:"):
        return _BUILTIN_CONTEXT
    directory = Path(config.model.id).expanduser()
    try:
        found = directory if directory.is_dir() else cached_copy(config.model)
        stored = read_config(found) if found else {}
    except ConfigError:  # the rules on curves need no model
        return None
    longest = (stored.get("text_config") or stored).get("max_position_embeddings")
    return longest if isinstance(longest, int) else None


def _figures(run: RunDirectory) -> tuple[Mapping[str, Any], ...] | str:
    path = run.results
    if not path.is_file():
        return f"it was not evaluated: finetune eval {run.path}"
    return tuple(read_json(path)["figures"])
