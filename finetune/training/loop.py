"""The training loop: the gradient of a step depends on the global batch alone.

For each optimizer step, the losses of all supervised tokens of the global batch are summed, whatever micro-batch or device they fall on,
and divided once by their number. Micro-batches are accumulated without a word to the host; devices add up their gradients once a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from finetune.config.schema import AdaLora
from finetune.data.batches import collate
from finetune.errors import DivergedError, RunInterruptedError
from finetune.model import adalora
from finetune.model.head import target_losses
from finetune.planning.steps import Steps
from finetune.training.batching import dropout_seed, global_batch, micro_batches, share
from finetune.training.checkpoints import Progress
from finetune.training.distributed import idle_rounds
from finetune.training.forks import Forks, can_fork
from finetune.training.lanes import run_lanes, split
from finetune.training.metrics import Sampled, StepDone
from finetune.training.optimizer import rate_factor, set_rates
from finetune.training.participation import require_change, require_gradients, sums_of
from finetune.training.session import CALMER, Session
from finetune.training.signals import StopRequest
from finetune.training.threads import suited_threads
from finetune.training.validation import validate


def fit(session: Session, progress: Progress, stop: StopRequest) -> Progress:
    """Train from ``progress`` to the end of the run.

    Raises DivergedError for a loss or gradient that is not finite (nothing of that step is kept), RunInterruptedError after a signal, with
    a checkpoint saved, VerificationError where a trainable tensor gets no gradient or never changes.
    """
    with _beside(session):
        return _steps(session, progress, stop)


def _steps(session: Session, progress: Progress, stop: StopRequest) -> Progress:
    start = sums_of(session.parameters)
    first = progress.step
    if progress.evaluation_due or progress.samples_due:  # a signal came while they ran
        progress = _conclude(session, progress, stop)
    session.scorer.model.train()
    while progress.step < session.steps.total and not progress.stopped_early:
        row = _optimizer_step(session, progress.step, check_gradients=progress.step == first)
        session.record(row)
        progress = progress.advanced(
            step=row.step,
            tokens=progress.tokens + row.tokens,
            supervised_tokens=progress.supervised_tokens + row.supervised_tokens,
            evaluation_due=bool(session.data.validation) and _due(row.step, session.config.train.evaluate.every_steps, session.steps),
            samples_due=_samples_due(session, row.step),
        )
        progress = _conclude(session, progress, stop)
    if first == 0 and progress.step > 1:  # a resumed run may have only the schedule's last, tiny steps left
        pruned = adalora.pruned_whole(session.scorer.model)
        require_change({name: sums for name, sums in start.items() if name not in pruned}, sums_of(session.parameters), session.config)
    return progress


@contextmanager
def _beside(session: Session) -> Iterator[None]:
    """Inside, lanes may be computed by forks of this process."""
    if session.work is None or not can_fork():
        yield
        return
    session.forks = Forks(partial(_loss, session), [*session.parameters.values()], session.clock)
    try:
        with session.forks.open():
            yield
    finally:
        session.forks = None


def _conclude(session: Session, progress: Progress, stop: StopRequest) -> Progress:
    """What follows a step: samples, validation and a checkpoint where they are due; RunInterruptedError where a signal came."""
    improved, measured = False, progress.samples_due or progress.evaluation_due
    if progress.samples_due:
        progress = _take_samples(session, progress, stop)
    if progress.evaluation_due:
        progress, improved = validate(session, progress, stop)
    if measured:  # not before every step: to tell each module so takes 5 ms for SmolLM2
        session.scorer.model.train()
    stopping = session.any_device(bool(stop))
    if improved or stopping or progress.stopped_early or _due(progress.step, session.config.train.checkpoint.every_steps, session.steps):
        session.save(progress)
    if stopping:
        raise RunInterruptedError(
            f"stopped by a signal after step {progress.step} of {session.steps.total}; a checkpoint is saved",
            signal_number=stop.signal_number or 15,
            where=session.config.output,
            fix=f"finetune train {session.config.output}/config.yaml --resume",
        )
    return progress


def _samples_due(session: Session, step: int) -> bool:
    asked = session.config.train.samples
    return asked is not None and session.sampler is not None and _due(step, asked.every_steps, session.steps)


def _take_samples(session: Session, progress: Progress, stop: StopRequest) -> Progress:
    """Let the model answer; after a signal it is given up, and stays due. One device does it, where it has the whole model."""
    takes_part = session.sampler is not None and (session.spread or session.accelerator.process_index == 0)
    found = session.sampler.sample(session.scorer, stop, in_step=session.spread) if session.sampler and takes_part else None
    if session.any_device(takes_part and found is None):
        return progress
    if found is not None:
        session.record(Sampled(progress.step, *found))
    return progress.advanced(samples_due=False)


def _due(step: int, every: int | None, steps: Steps) -> bool:
    return step == steps.total or step % (every or steps.per_epoch) == 0


def _optimizer_step(session: Session, step: int, *, check_gradients: bool) -> StepDone:
    """Optimizer step number ``step`` (0-based)."""
    began = time.perf_counter()
    config, train, accelerator = session.config, session.data.train, session.accelerator
    with session.clock.reading():
        indices = global_batch(len(train), config.train.batch_size, config.seed, step)
        supervised = int(train.supervised[indices].sum())
    set_rates(session.optimizer, rate_factor(config.schedule, session.steps, step))
    adaptive = isinstance(config.tuning, AdaLora)
    loss = _gradients(session, step, indices, supervised)
    if check_gradients:
        require_gradients(session)
    if accelerator.num_processes > 1:
        loss = accelerator.reduce(loss, "sum")
        _add_gradients(session)
    if adaptive:
        adalora.add_penalty(session.scorer.model)  # after the sum over devices: each adds the same once
    tensors = [*session.parameters.values()]
    with suited_threads(tensors):
        norm = torch.nn.utils.clip_grad_norm_(tensors, config.train.max_grad_norm or math.inf)
    values = (float(loss), float(norm))
    if not all(math.isfinite(value) for value in values):
        raise _diverged(step + 1, values, [train.where(index) for index in indices])
    with suited_threads(tensors):
        session.optimizer.step()
    if adaptive:
        adalora.update_ranks(session.scorer.model, step + 1)
    session.optimizer.zero_grad(set_to_none=True)
    return StepDone(
        step=step + 1,
        epoch=(step + 1) / session.steps.per_epoch,
        loss=values[0],
        grad_norm=values[1],
        learning_rates={group.name: state["lr"] for group, state in zip(session.groups, session.optimizer.param_groups, strict=True)},
        tokens=int(train.lengths[indices].sum()),
        supervised_tokens=supervised,
        seconds=time.perf_counter() - began,
        input_seconds=session.clock.take(),
        memory_bytes=session.memory_bytes(),
    )


def _gradients(session: Session, step: int, indices: list[int], supervised: int) -> torch.Tensor:
    """Set the gradients of this device's share of step ``step``; returns its share of the loss, on the device."""
    train, scorer, accelerator = session.data.train, session.scorer, session.accelerator
    if session.work:
        costs = [session.work.tokens(int(train.lengths[index]), int(train.supervised[index])) for index in indices]
        lanes = split(indices, train.lengths, scorer.max_tokens, torch.get_num_threads(), costs)
        if len(lanes) > 1:
            forks = session.forks
            submit = partial(forks.submit, supervised) if forks and forks.ready(len(lanes) - 1) else None
            return run_lanes(lanes, lambda piece: _loss(session, piece, supervised), [*session.parameters.values()], submit)
    pieces = micro_batches(indices, train.lengths, scorer.max_tokens, packed=scorer.packed)
    loss = torch.zeros((), device=scorer.device)
    for number, piece in share(pieces, accelerator.process_index, accelerator.num_processes):
        loss += _backward(session, piece, dropout_seed(session.config.seed, step, number), supervised)
    _keep_pace(session, pieces)
    return loss


def _keep_pace(session: Session, pieces: list[list[int]]) -> None:
    """Run the passes that other devices make besides, on one example and for nothing: a block is gathered by all or by none."""
    if session.spread:
        for _ in range(idle_rounds(pieces, session.accelerator.process_index, session.accelerator.num_processes)):
            _backward(session, pieces[-1][-1:], 0, math.inf)


def _backward(session: Session, piece: list[int], seed: int, supervised: float) -> torch.Tensor:
    """Add one micro-batch's share of the gradient, in a step of ``supervised`` tokens; returns its share of the loss, on the device."""
    torch.manual_seed(seed)
    loss = _loss(session, piece, supervised)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _loss(session: Session, piece: list[int], supervised: float) -> torch.Tensor:
    """One micro-batch's share of the loss of a step of ``supervised`` tokens."""
    with session.clock.reading():
        batch = collate([session.data.train[index] for index in piece])  # on the host, where positions are decided without waiting
    with session.scorer.autocast():
        losses = target_losses(session.scorer.model, batch.ids, batch.attention, batch.supervised)
    return losses.sum() / supervised


def _add_gradients(session: Session) -> None:
    """Sum gradients over devices; one that had no micro-batch adds zero."""
    for parameter in session.parameters.values():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = session.accelerator.reduce(gradient, "sum")


def _diverged(step: int, values: tuple[float, float], rows: list[str]) -> DivergedError:
    shown = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
    return DivergedError(
        f"the loss ({values[0]}) or the gradient's norm ({values[1]}) is not finite in step {step}; the step was not applied",
        where=f"rows {shown}",
        fix=CALMER,
    )
