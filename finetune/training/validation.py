"""Validation during training: one loss for all devices, the best step so far, and when to give up hope."""

from __future__ import annotations

import math
import time

import torch

from finetune.errors import DivergedError
from finetune.training.checkpoints import Progress
from finetune.training.distributed import idle_scores
from finetune.training.metrics import Evaluated
from finetune.training.session import CALMER, Session
from finetune.training.signals import StopRequest


def validate(session: Session, progress: Progress, stop: StopRequest) -> tuple[Progress, bool]:
    """Validation loss; whether it is the best so far. After a signal it is given up, and stays due."""
    began = time.perf_counter()
    loss = _validation_loss(session, stop)
    if loss is None:
        return progress, False
    if not math.isfinite(loss):
        raise DivergedError(f"the validation loss is {loss} after step {progress.step}", where=session.config.output, fix=CALMER)
    improved = progress.best_loss is None or loss < progress.best_loss
    session.record(Evaluated(progress.step, loss, time.perf_counter() - began, improved))
    progress = progress.advanced(last_loss=loss, evaluation_due=False)
    if improved:
        progress = progress.advanced(best_loss=loss, best_step=progress.step)
    early = session.config.train.early_stopping
    if early is None:
        return progress, improved
    if progress.patience_loss is None or loss < progress.patience_loss - early.min_delta:
        return progress.advanced(patience_loss=loss, evaluations_without_gain=0), improved
    waited = progress.evaluations_without_gain + 1
    return progress.advanced(evaluations_without_gain=waited, stopped_early=waited >= early.patience), improved


class _GivenUpError(Exception):
    """A signal came during validation."""


def _validation_loss(session: Session, stop: StopRequest) -> float | None:
    """Mean nats a supervised token; every device scores its share, and all get one figure to decide by. None where it was given up."""
    rank, world = session.accelerator.process_index, session.accelerator.num_processes
    scorer, rows = session.scorer, session.data.validation

    def give_up(_: int) -> None:
        if stop and not session.spread:  # where blocks are shared out, the others wait for every pass
            raise _GivenUpError

    try:
        total, count = scorer.total_loss(rows[rank::world], give_up)
    except _GivenUpError:
        total, count = math.nan, -1
    if session.spread:  # before devices add anything up: those that have more to score wait for a block, not for a sum
        for _ in range(idle_scores(rows.lengths.tolist(), scorer.max_tokens, rank, world, packed=scorer.packed)):
            scorer.total_loss(rows[:1])
    if session.any_device(count < 0):
        return None
    if world > 1:
        sums = session.accelerator.reduce(torch.tensor([total, count], dtype=torch.float64, device=session.scorer.device), "sum")
        total, count = sums.tolist()
    return total / count
