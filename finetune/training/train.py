"""A training run from configuration to sealed adapter, in the order in which things may fail cheaply."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from finetune.card import base_license
from finetune.config.schema import AdaLora, Config
from finetune.errors import ConfigError, HardwareError, RunInterruptedError, VerificationError
from finetune.model.adalora import plan_ranks
from finetune.model.adapters import trainable
from finetune.model.builtin import fingerprint
from finetune.model.head import causal_model
from finetune.model.load import require_vocabulary
from finetune.model.packing import enable_packing
from finetune.model.tokens import token_ids
from finetune.planning.groups import assign_groups
from finetune.runs import RunDirectory, locked, open_run, require_free, sweep
from finetune.scoring import Scorer
from finetune.sealed import read_json
from finetune.training.build import Built, Materials, build_model
from finetune.training.checkpoints import (
    Progress,
    Snapshot,
    load_checkpoint,
    read_progress,
    rotate,
    take_snapshot,
    write_checkpoint,
)
from finetune.training.distributed import explained, require_own_launch
from finetune.training.export import export
from finetune.training.forecast import announce
from finetune.training.header import started
from finetune.training.inputs import Inputs, gather
from finetune.training.loop import fit
from finetune.training.metrics import (
    AlreadyFinished,
    CheckpointDamaged,
    CheckpointSaved,
    MetricsFile,
    Observer,
    Preparing,
    Row,
    ignore,
)
from finetune.training.optimizer import build_optimizer
from finetune.training.probe import probe_gpu, what_ran_out
from finetune.training.records import Parts, Request, Start, begin, failure_noted, require_room, run_id
from finetune.training.resume import identity, same_settings
from finetune.training.samples import Sampler, make_sampler
from finetune.training.session import Session
from finetune.training.sharding import shard
from finetune.training.signals import Interruption, StopRequest, stop_on_signals
from finetune.training.tracking import require_trackers, trackers
from finetune.training.writer import CheckpointWriter


@dataclass(frozen=True, slots=True)
class Watching:
    """Who looks on while the steps run."""

    sampler: Sampler | None
    observer: Observer
    stop: StopRequest


def train(
    config: Config,
    observer: Observer = ignore,
    *,
    resume: bool = False,
    accept: Sequence[str] = (),
    origins: Mapping[str, object] | None = None,
) -> RunDirectory:
    """Train as ``config`` says and return the run directory; with ``resume`` continue the run that lies there.

    ``accept`` names what may have changed since it was started; ``origins``, by dotted path, are recorded. Raises the errors of
    `finetune.errors`; whatever is wrong with configuration, data or targets is known before anything is written. RunInterruptedError
    after SIGINT, SIGTERM, SIGHUP or SIGUSR1, in any phase.
    """
    run = RunDirectory(Path(config.output))
    if accept and not resume:
        raise ConfigError("--accept goes with --resume", where=f"--accept {accept[0]}", fix="leave it out: a new run has nothing to accept")
    with stop_on_signals() as stop, explained(stop):
        try:
            return _train(run, config, observer, stop, Request(accept if resume else None, origins))
        except Interruption as signal:
            begun = run.environment.is_file()
            fix = f"finetune train {run.config} --resume" if begun else "nothing was begun: run the same command again"
            raise RunInterruptedError("stopped by a signal", signal_number=signal.number, where=str(run.path), fix=fix) from None


def _train(run: RunDirectory, config: Config, observer: Observer, stop: StopRequest, request: Request) -> RunDirectory:
    accept = request.accept
    with ExitStack() as held:
        if accept is None:
            require_free(run.path)
        else:
            _require_begun(run)
            held.enter_context(locked(run.path) if is_first() else nullcontext())
            if same_settings(run, config) and run.is_finished():
                observer(AlreadyFinished(run.path))
                return run
        newest, damaged = (None, []) if accept is None else _newest(run)
        require_trackers(config.tracking)
        require_own_launch()
        announce(config, observer, first=is_first(), new=accept is None)
        inputs = gather(config, lambda stage, done, of: observer(Preparing(stage, done, of)))
        sampler = make_sampler(config, inputs.renderer, inputs.data.validation)
        base_license(inputs.base, config.model.id)  # the card names it: what cannot be read is known now, and not after the last step
        if accept is not None:
            inputs = replace(inputs, resolved=inputs.resolved.pinned(**read_json(run.environment)["computed_in"]))
        set_seed(config.seed)  # before the model is built: the seed must reach the adapter's initialization (pitfall A13)
        # a run that was killed before its first checkpoint begins again, with the same initialization
        built = _build(config, inputs, run.path if newest else None)
        now = _identity(config, inputs, built)
        # Process groups exist only from here on: slow preparation on one rank cannot time out another (pitfall B4).
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        inputs = _probed(config, inputs, built, accelerator)
        parts = _equip(config, inputs, built, accelerator)
        if accelerator.is_main_process:
            require_room(run, config, parts)
            held.enter_context(locked(run.path) if accept is None else nullcontext())
        progress = read_progress(newest, run_id(run)) if newest else Progress()
        start = begin(Start(run, progress, accept, now, preflight=newest is None, origins=request.origins), config, parts, accelerator)
        for path, error in damaged if accelerator.is_main_process else ():  # only now: a resumption that is refused changes nothing
            observer(CheckpointDamaged(path, error.problems[0].what, run.set_aside(path)))
        if newest:
            load_checkpoint(newest, built.model, parts.optimizer)
        observer(started(config, parts, accelerator, start))
        with trackers(config, start, observer, accelerator) as told, failure_noted(run, accelerator):
            progress = _train_from(start, config, parts, accelerator, Watching(sampler, told, stop))
        if accelerator.is_main_process:
            export(run, config, inputs.renderer.tokenizer, built.model, progress)
        accelerator.wait_for_everyone()
    return run


def is_first() -> bool:
    """Whether this is the only process or the first of several, known before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def _require_begun(run: RunDirectory) -> None:
    if not run.environment.is_file():
        raise ConfigError("there is no run to resume", where=str(run.path), fix="leave out --resume to begin it")
    open_run(run.path)


def _newest(run: RunDirectory) -> tuple[Path | None, list[tuple[Path, VerificationError]]]:
    """The newest intact checkpoint of a run, None where it was killed before its first; and the damaged ones that are newer."""
    if is_first():
        sweep(run)
    damaged: list[tuple[Path, VerificationError]] = []
    newest = run.newest_checkpoint(lambda path, error: damaged.append((path, error)))
    if damaged and newest is None:
        raise VerificationError(
            f"no checkpoint of this run is intact; the newest: {damaged[0][1].problems[0].what}",
            where=str(damaged[0][0]),
            fix="restore the directory from a copy, or start again with another output",
        )
    return newest, damaged


def _device() -> torch.device:
    """This process's own, as accelerate will choose it."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _build(config: Config, inputs: Inputs, resumed: Path | None) -> Built:
    """The model, before there is a process group: loading a large base, and LoftQ, take as long as they take."""
    materials = Materials(inputs.base, inputs.resolved, token_ids(inputs.renderer.tokenizer, config.model.new_tokens), inputs.data.train)
    # a model that is to be spread need not fit on one device: it is built on the host
    device = torch.device("cpu") if inputs.resolved.strategy.value == "fsdp" else _device()
    built = build_model(config, materials, device, resumed)
    if isinstance(config.tuning, AdaLora):
        plan_ranks(built.model, config.tuning, inputs.steps.total)
    require_vocabulary(inputs.renderer.tokenizer, built.model)
    return built


def _identity(config: Config, inputs: Inputs, built: Built) -> dict[str, Any]:
    """What makes this run the run it is. The first process alone compares it, so that a large base is not read once a device."""
    base = fingerprint(inputs.base) if is_first() else ""
    prints = {"data": inputs.data.fingerprint, "base": base, "chat template": inputs.renderer.template_hash}
    return identity(config, prints, trainable(built.model))


def _probed(config: Config, inputs: Inputs, built: Built, accelerator: Any) -> Inputs:
    """``inputs`` with the micro-batch that a GPU holds, where it was left open; the same on every device, so that all cut alike.

    Blocks that are spread over devices would have to run in step, and stay with the usual size.
    """
    if config.train.tokens_per_device != "auto" or accelerator.device.type != "cuda" or inputs.resolved.strategy.value == "fsdp":
        return inputs
    scorer = Scorer(built.model, accelerator.device, inputs.resolved.precision.value)
    choice = probe_gpu(scorer, inputs.data.train)
    least = int(accelerator.gather(torch.tensor([choice.value], device=accelerator.device)).min())
    choice = replace(choice, value=least)
    return replace(inputs, resolved=replace(inputs.resolved, tokens_per_device=choice))


def _equip(config: Config, inputs: Inputs, built: Built, accelerator: Any) -> Parts:
    """Spread the model over the devices where that is the strategy, and give it its optimizer."""
    if inputs.resolved.strategy.value == "fsdp":
        shard(built.model, accelerator.device, accelerator.num_processes, offload=config.distributed.offload)
        if built.accelerated is not None:  # not on the host, where it was built: whether it is exact depends on the device
            packed = enable_packing(causal_model(built.model))
            built = replace(built, accelerated=replace(built.accelerated, packed=packed))
    parameters = trainable(built.model)
    decided = config.optimizer.model_copy(update={"method": inputs.resolved.optimizer.value})
    groups = assign_groups(parameters, decided)
    return Parts(inputs, built, groups, build_optimizer(parameters, groups, decided), decided.method)


def _train_from(start: Start, config: Config, parts: Parts, accelerator: Any, watching: Watching) -> Progress:
    """Train to the end; returns when the last checkpoint is on disk."""
    observer, stop = watching.observer, watching.stop
    run, own_id, model, inputs = start.run, run_id(start.run), parts.built.model, parts.inputs
    due = start.progress.evaluation_due
    metrics = MetricsFile(run, start.progress.step, evaluation_due=due) if accelerator.is_main_process else None

    def write(snapshot: Snapshot) -> Path:
        run.flush_metrics()  # a checkpoint never knows of a step that metrics.jsonl could still lose
        path = write_checkpoint(run, snapshot)
        rotate(run, snapshot.progress.step, config.train.checkpoint.keep, snapshot.progress.best_step)
        return path

    with CheckpointWriter(write, lambda step, path: observer(CheckpointSaved(step, path))) as writer:

        def record(event: Row) -> None:
            if metrics is not None:
                metrics.append(event)
                observer(event)
                writer.poll()

        def save(progress: Progress) -> None:
            if metrics is not None:
                writer.submit(take_snapshot(run.path, own_id, model, parts.optimizer, progress))
            accelerator.wait_for_everyone()

        scorer = Scorer(model, accelerator.device, inputs.resolved.precision.value, inputs.resolved.tokens_per_device.value)
        session = Session(
            config, inputs.steps, inputs.data, scorer, parts.optimizer, parts.groups, accelerator, record, save, watching.sampler
        )
        if start.preflight:
            save(start.progress)
            writer.wait()  # proves before the first step that a checkpoint can be written (pitfall B7)
        with stop.finishing_steps():
            return _fit(session, start.progress, stop)


def _fit(session: Session, progress: Progress, stop: StopRequest) -> Progress:
    try:
        return fit(session, progress, stop)
    except torch.OutOfMemoryError as error:
        budget = session.scorer.max_tokens
        raise HardwareError(
            f"memory ran out with micro-batches of {budget} tokens: {what_ran_out(error)}",
            where=session.config.output,
            fix=f"finetune train {session.config.output}/config.yaml --resume -o train.tokens_per_device={max(16, budget // 2)}",
        ) from error
