"""What a run writes before its first step: settings, plan, fingerprints, and each later change that it was resumed with."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from finetune.config.dump import dump_config
from finetune.config.origins import record_origins
from finetune.config.schema import Config
from finetune.data.stored import save_rows
from finetune.errors import ConfigError, FinetuneError, HardwareError, RunInterruptedError
from finetune.hardware import environment
from finetune.planning.groups import ParameterGroup
from finetune.runs import RunDirectory, create_run, sweep
from finetune.sealed import bytes_below, read_json, replaced, require_space, sha256_of, write_json, write_text, writing
from finetune.training.build import Built
from finetune.training.checkpoints import Progress, checkpoint_bytes
from finetune.training.distributed import require_shared
from finetune.training.forecast import forecast
from finetune.training.resume import adjusted, reconcile, session_record, steps_on_disk, stretched

if TYPE_CHECKING:
    from finetune.training.inputs import Inputs

_LONGER = "a longer run has more: -o train.epochs=... (or train.max_steps)"
_PATIENT = "it stopped early: -o train.early_stopping.patience=... --accept train.early_stopping lets it go on"


def run_id(run: RunDirectory) -> str:
    """The name that the run's checkpoints bear."""
    return str(read_json(run.environment)["run_id"])


@dataclass(frozen=True, slots=True)
class Parts:
    """All that is built before the run directory is touched."""

    inputs: Inputs
    built: Built
    groups: list[ParameterGroup]
    optimizer: torch.optim.Optimizer
    method: str
    """`optimizer.method`, decided."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for beside the configuration."""

    accept: Sequence[str] | None
    """Names of what may have changed; None for a new run."""
    origins: Mapping[str, object] | None
    """Of the configuration's values, by dotted path; None where a program put it together."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins or goes on."""

    run: RunDirectory
    progress: Progress
    accept: Sequence[str] | None
    """Names of what may have changed; None for a new run."""
    identity: dict[str, Any]
    preflight: bool
    """Whether there is no checkpoint yet."""
    notes: tuple[str, ...] = ()
    """What is special about this start."""
    origins: Mapping[str, object] | None = None
    """Of the configuration's values, by dotted path; None where a program put it together."""


def begin(start: Start, config: Config, parts: Parts, accelerator: Any) -> Start:
    """Create the run directory and its records, or check that the one on disk is the same run and note what changed."""
    if accelerator.is_main_process:
        if start.accept is None:
            _create(start, config, parts, accelerator)
        else:
            _continue(start, config, parts, accelerator)
    accelerator.wait_for_everyone()
    require_shared(start.run.environment)
    sessions = read_json(start.run.environment)["sessions"]
    # also of those that were killed before a checkpoint of their own: it is still the one from before the change
    changes = [change for session in sessions if session["from_step"] >= start.progress.step for change in session["changes"]]
    return replace(start, progress=adjusted(start.progress, changes, config), notes=tuple(sessions[-1]["notes"]))


@contextmanager
def failure_noted(run: RunDirectory, accelerator: Any) -> Iterator[None]:
    """An error that ends this session is kept in its record, so that the run can be diagnosed; a signal is no error."""
    try:
        yield
    except RunInterruptedError:
        raise
    except FinetuneError as error:
        if accelerator.is_main_process:
            with suppress(HardwareError):  # the disk itself may be what failed, and the first error is the one to tell
                records = read_json(run.environment)
                records["sessions"][-1]["failed"] = {"error": type(error).__name__, "what": error.problems[0].what}
                write_json(run.environment, records)
        raise


def require_room(run: RunDirectory, config: Config, parts: Parts) -> None:
    """HardwareError unless the disk takes all checkpoints that will ever lie there at once (pitfall B7)."""
    keep = config.train.checkpoint.keep
    needed = (keep + 2) * checkpoint_bytes(parts.built.model, parts.method) - bytes_below(run.path / "checkpoints")
    require_space(run.path, needed, f"{keep + 2} checkpoints (train.checkpoint.keep, the best one, and one being written)")


def _create(start: Start, config: Config, parts: Parts, accelerator: Any) -> None:
    run, inputs = start.run, parts.inputs
    sweep(run)
    create_run(run.path)
    _write_settings(run, config, parts)
    if parts.built.start is not None:
        with writing(run.path):
            parts.built.start.save(run.path)
    began = datetime.now(UTC).isoformat()
    records = environment() | {"run_id": uuid.uuid4().hex, "started": began, "seed": config.seed, "identity": start.identity}
    records |= {"computed_in": inputs.resolved.types(), "rows_sha256": sha256_of(run.rows)}
    records |= {"origins": record_origins(config, start.origins, {})}
    write_json(run.environment, records | {"sessions": [session_record(began, start.progress, accelerator.num_processes, (), ())]})


def _continue(start: Start, config: Config, parts: Parts, accelerator: Any) -> None:
    run, steps, progress = start.run, parts.inputs.steps, start.progress
    changes = reconcile(run, start.identity, config, steps, start.accept or ())
    records, before = read_json(run.environment), steps_on_disk(run)
    stopped = adjusted(progress, [asdict(change) for change in changes], config).stopped_early
    if run.is_finished() and (stopped or steps.total <= progress.step):
        fix = _PATIENT if stopped else _LONGER
        raise ConfigError("the run is finished, and these changes give it nothing more to do", where=str(run.path), fix=fix)
    sessions = records.get("sessions", [])
    notes = [f"{change.key} was {change.before}, is {change.now} from step {progress.step + 1} on" for change in changes]
    if steps != before:
        notes.append(stretched(config, before, steps, progress))
    if sessions and sessions[-1]["devices"] != accelerator.num_processes:
        was = sessions[-1]["devices"]
        notes.append(f"{accelerator.num_processes} devices, {was} before: the same examples in every step, sums equal but for rounding")
    # environment.json last: after a kill in between, it names the changes as still to be made
    _write_settings(run, config, parts)
    records |= {"identity": start.identity, "rows_sha256": sha256_of(run.rows)}
    records |= {"origins": record_origins(config, start.origins, records.get("origins", {}))}
    session = session_record(datetime.now(UTC).isoformat(), progress, accelerator.num_processes, changes, notes)
    write_json(run.environment, records | {"sessions": [*sessions, session]})


def _write_settings(run: RunDirectory, config: Config, parts: Parts) -> None:
    """config.yaml, plan.json and the validation rows."""
    inputs = parts.inputs
    with replaced(run.rows) as temporary:
        save_rows(temporary, inputs.data.train, inputs.data.validation)
    groups = [group.summary() for group in parts.groups]
    plan = {"steps": asdict(inputs.steps), "resolved": inputs.resolved.as_dict(), "groups": groups, "data": inputs.data.report.as_dict()}
    planned = forecast(config, inputs.data.report, inputs.resolved)
    write_json(run.plan, plan | {"plan": planned.plan.as_dict() if planned.plan else {"unknown": planned.reason}})
    write_text(run.config, dump_config(config.model_copy(update={"output": str(run.path.absolute())})))
