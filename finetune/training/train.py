"""A training run from configuration to sealed adapter, in the order in which things may fail cheaply."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from finetune.config.dump import dump_config
from finetune.config.schema import AdaLora, Config
from finetune.data.prepare import PreparedData, prepare
from finetune.data.render import Renderer
from finetune.data.stored import save_rows
from finetune.errors import ConfigError, HardwareError, VerificationError
from finetune.hardware import crowd_size, detect, environment
from finetune.model.adalora import plan_ranks
from finetune.model.adapters import count_parameters, trainable
from finetune.model.builtin import fingerprint, resolve_model
from finetune.model.load import load_tokenizer, require_vocabulary
from finetune.model.tokens import token_ids
from finetune.planning.resolve import Resolved, resolve
from finetune.planning.steps import Steps, count_steps
from finetune.planning.strategy import Crowd, read_weights
from finetune.runs import RunDirectory, create_run, locked, open_run, read_json, require_free, sha256_of, sweep, write_json, write_text
from finetune.scoring import Scorer
from finetune.training.build import Built, Materials, build_model
from finetune.training.checkpoints import Progress, load_checkpoint, rotate, save_checkpoint
from finetune.training.distributed import explained, require_own_launch, require_shared
from finetune.training.export import export
from finetune.training.groups import ParameterGroup, assign_groups
from finetune.training.loop import Session, fit
from finetune.training.metrics import (
    AlreadyFinished,
    CheckpointSaved,
    Evaluated,
    Event,
    MetricsFile,
    Observer,
    Preparing,
    Started,
    StepDone,
    ignore,
)
from finetune.training.optimizer import build_optimizer
from finetune.training.resume import identity, require_same
from finetune.training.sharding import shard
from finetune.training.signals import StopRequest, stop_on_signals
from finetune.training.tracking import require_trackers, scalars, trackers


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known before a weight is loaded."""

    base: Path
    """Directory of the base model."""
    renderer: Renderer
    data: PreparedData
    resolved: Resolved
    steps: Steps


def gather(config: Config, progress: Callable[[str, int, int], None] = lambda *_: None) -> Inputs:
    """Find the model, prepare the data and decide every "auto"; nothing is written but the cache of prepared data.

    ``progress(stage, done, of)`` follows the preparation.
    """
    base = resolve_model(config.model.id, config.model.revision)
    renderer = Renderer(load_tokenizer(base, config.model.new_tokens))
    data = prepare(config.data, renderer, config.seed, progress)
    crowd = Crowd(read_weights(base), *crowd_size())
    return Inputs(base, renderer, data, resolve(config, detect(), crowd), count_steps(config, len(data.train)))


def train(config: Config, observer: Observer = ignore, *, resume: bool = False) -> RunDirectory:
    """Train as ``config`` says and return the run directory; with ``resume`` continue the run that lies there.

    Raises the errors of `finetune.errors`; whatever is wrong with configuration, data or targets is known before anything is written.
    """
    run = RunDirectory(Path(config.output))
    if not resume:
        require_free(run.path)
    elif not run.environment.is_file():
        raise ConfigError("there is no run to resume", where=str(run.path), fix="leave out --resume to begin it")
    elif _is_finished(open_run(run.path)):
        observer(AlreadyFinished(run.path))
        return run
    require_trackers(config.tracking)
    require_own_launch()
    inputs = gather(config, lambda stage, done, of: observer(Preparing(stage, done, of)))
    if resume:
        inputs = replace(inputs, resolved=inputs.resolved.pinned(**read_json(run.environment)["computed_in"]))
    # Process groups exist only from here on: slow preparation on one rank cannot time out another (pitfall B4).
    with explained(), stop_on_signals() as stop:
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        set_seed(config.seed)  # before the model is built: the seed must reach the adapter's initialization (pitfall A13)
        # a run that was killed before its first checkpoint begins again, with the same initialization
        resumed = resume and bool(run.checkpoint_steps())
        parts = _build(config, inputs, accelerator, run.path if resumed else None)
        with locked(run.path) if accelerator.is_main_process else nullcontext():
            start = _begin(run, config, parts, resume=resume)
            if resumed:
                start = replace(start, progress=_load_newest(run, start.run_id, parts))
            observer(_started(config, parts, start.progress.step))
            opened: AbstractContextManager[list[Any]] = trackers(config.tracking, run) if accelerator.is_main_process else nullcontext([])
            with opened as watching:
                session = _session(start, config, parts, _joined(observer, watching))
                if not resumed:
                    session.save(start.progress)  # proves before the first step that a checkpoint can be written (pitfall B7)
                progress = _fit(session, start.progress, stop)
            if accelerator.is_main_process:
                export(run, config, inputs.renderer.tokenizer, parts.built.model, progress)
            accelerator.wait_for_everyone()
    return run


def _is_finished(run: RunDirectory) -> bool:
    """Whether nothing is left to do; a result that was damaged since is written again from the newest checkpoint."""
    with suppress(VerificationError):
        return run.trained() is not None
    return False


def _fit(session: Session, progress: Progress, stop: StopRequest) -> Progress:
    try:
        return fit(session, progress, stop)
    except torch.OutOfMemoryError as error:
        budget = session.scorer.max_tokens
        raise HardwareError(
            f"the device ran out of memory with micro-batches of {budget} tokens",
            where=session.config.output,
            fix=f"finetune train {session.config.output}/config.yaml --resume -o train.tokens_per_device={max(16, budget // 2)}",
        ) from error


@dataclass(frozen=True, slots=True)
class _Parts:
    """All that is built before the run directory is touched."""

    inputs: Inputs
    built: Built
    groups: list[ParameterGroup]
    optimizer: torch.optim.Optimizer
    accelerator: Any


def _build(config: Config, inputs: Inputs, accelerator: Any, resumed: Path | None) -> _Parts:
    new_ids = token_ids(inputs.renderer.tokenizer, config.model.new_tokens)
    materials = Materials(inputs.base, inputs.resolved, new_ids, inputs.data.train)
    spread = inputs.resolved.strategy.value == "fsdp"
    # a model that is to be spread need not fit on one device: it is built on the host
    built = build_model(config, materials, torch.device("cpu") if spread else accelerator.device, resumed)
    if spread:
        shard(built.model, accelerator.device, accelerator.num_processes, offload=config.distributed.offload)
    if isinstance(config.tuning, AdaLora):
        plan_ranks(built.model, config.tuning, inputs.steps.total)
    require_vocabulary(inputs.renderer.tokenizer, built.model)
    parameters = trainable(built.model)
    decided = config.optimizer.model_copy(update={"method": inputs.resolved.optimizer.value})
    groups = assign_groups(parameters, decided)
    return _Parts(inputs, built, groups, build_optimizer(parameters, groups, decided), accelerator)


@dataclass(frozen=True, slots=True)
class _Start:
    """A run directory that is ready to be written, and where the run stands."""

    run: RunDirectory
    run_id: str
    progress: Progress


def _begin(run: RunDirectory, config: Config, parts: _Parts, *, resume: bool) -> _Start:
    """Create the run directory and its records, or check that the one on disk is the same run."""
    inputs, built = parts.inputs, parts.built
    prints = {"data": inputs.data.fingerprint, "base": fingerprint(inputs.base), "chat template": inputs.renderer.template_hash}
    now = identity(config, prints, trainable(built.model))
    if parts.accelerator.is_main_process:
        sweep(run)
    if resume:
        require_same(run, now)
    elif parts.accelerator.is_main_process:
        create_run(run.path)
        write_text(run.config, dump_config(config.model_copy(update={"output": str(run.path.absolute())})))
        save_rows(run.rows, inputs.data.train, inputs.data.validation)
        groups = [group.summary() for group in parts.groups]
        write_json(
            run.plan,
            {"steps": asdict(inputs.steps), "resolved": inputs.resolved.as_dict(), "groups": groups, "data": inputs.data.report.as_dict()},
        )
        if built.start is not None:
            built.start.save(run.path)
        write_json(
            run.environment,
            environment()
            | {"run_id": uuid.uuid4().hex, "started": datetime.now(UTC).isoformat(), "seed": config.seed, "identity": now}
            | {"computed_in": inputs.resolved.types(), "rows_sha256": sha256_of(run.rows)},
        )
    parts.accelerator.wait_for_everyone()
    require_shared(run.environment)
    return _Start(run, str(read_json(run.environment)["run_id"]), Progress())


def _load_newest(run: RunDirectory, run_id: str, parts: _Parts) -> Progress:
    found = run.newest_checkpoint()
    if found is None:
        raise VerificationError("no checkpoint of this run is intact", where=str(run.path), fix="start again with another output")
    return load_checkpoint(found, run_id, parts.built.model, parts.optimizer)


def _session(start: _Start, config: Config, parts: _Parts, observer: Observer) -> Session:
    inputs, accelerator = parts.inputs, parts.accelerator
    metrics = MetricsFile(start.run, start.progress.step) if accelerator.is_main_process else None

    def record(event: StepDone | Evaluated) -> None:
        if metrics is not None:
            metrics.append(event)
            observer(event)

    def save(progress: Progress) -> None:
        if metrics is not None:
            path = save_checkpoint(start.run, start.run_id, parts.built.model, parts.optimizer, progress)
            rotate(start.run, config.train.checkpoint.keep, progress.best_step)
            observer(CheckpointSaved(progress.step, path))
        accelerator.wait_for_everyone()

    scorer = Scorer(parts.built.model, accelerator.device, inputs.resolved.precision.value, inputs.resolved.tokens_per_device.value)
    return Session(config, inputs.steps, inputs.data, scorer, parts.optimizer, parts.groups, accelerator, record, save)


def _joined(observer: Observer, watching: list[Any]) -> Observer:
    """``observer`` and every tracker."""

    def tell(event: Event) -> None:
        observer(event)
        if isinstance(event, StepDone | Evaluated):
            for tracker in watching:
                tracker.log(scalars(event), step=event.step)

    return tell


def _kernels(built: Built) -> tuple[str, str]:
    if built.accelerated is None:
        return "plain", "stated in train.kernels"
    return built.accelerated.summary, "where a probe of the model found them exact"


def _started(config: Config, parts: _Parts, done: int) -> Started:
    resolved, counts = parts.inputs.resolved, parts.inputs.data.counts
    return Started(
        steps=parts.inputs.steps,
        done=done,
        trainable=sum(parameter.numel() for parameter in trainable(parts.built.model).values()),
        total=count_parameters(parts.built.model),
        groups=tuple(group.summary() for group in parts.groups),
        counts=counts,
        choices={
            "precision": (resolved.precision.value, resolved.precision.reason),
            "tokens a micro-batch": (str(resolved.tokens_per_device.value), resolved.tokens_per_device.reason),
            **({"strategy": (resolved.strategy.value, resolved.strategy.reason)} if parts.accelerator.num_processes > 1 else {}),
            **({"optimizer": (resolved.optimizer.value, resolved.optimizer.reason)} if config.optimizer.method == "auto" else {}),
            "gradient checkpointing": ("on" if resolved.gradient_checkpointing.value else "off", resolved.gradient_checkpointing.reason),
            "kernels": _kernels(parts.built),
        },
        notes=parts.built.notes,
        device=f"{parts.accelerator.num_processes} x {parts.accelerator.device.type}, base {config.quantization.method}",
    )
