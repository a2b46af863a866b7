"""What a user sees of a run while it trains: how it was set up, then a live bar in a terminal or a line now and then in a pipe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from finetune.cli import view
from finetune.cli.live.figures import Figures
from finetune.cli.live.panel import Look, beginning, ending, panel, plain_line
from finetune.cli.live.pinned import Pinned, held, is_live
from finetune.cli.workers import is_first
from finetune.runs import RunDirectory

if TYPE_CHECKING:
    from finetune.config.schema import Config

_REST, _LEFT = "(rest)", ", AdamW"
"""Beginning and end of the names that the training gives to groups: what no entry matched, and what is left to AdamW."""
_LINES = 20
"""Of a whole run in a pipe, for steps that are quick."""
_LONGEST_SILENCE_S = 300.0
_SHOWN = 120
"""Characters of a prompt or an answer in a pipe."""


class TrainingView:
    """Follows a run of ``config``; ``planned_speed``: tokens a second that the plan counted with, where it has a figure."""

    def __init__(self, config: Config, planned_speed: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._preparation = view.Preparation()
        self._figures = Figures(clock)
        self._figures.max_norm = config.train.max_grad_norm
        blocks = (view.err.encoding or "").lower().startswith("utf")
        self._look = Look(config.train.epochs, blocks, planned_speed, config.data.validation is not None)
        self._pinned: Pinned | None = None
        self._every = 1
        self._spoken = clock()

    def __call__(self, event: Any) -> None:
        """Show one event of the run."""
        handler = getattr(self, f"_on_{type(event).__name__.lower()}")
        handler(event)

    @contextmanager
    def running(self) -> Iterator[TrainingView]:
        """Keep the terminal clean even when the run ends in an error; of several workers, the first alone draws."""
        quiet = nullcontext() if is_first() or not is_live(view.err) else held(f"worker {os.environ['RANK']}")
        try:
            with quiet:
                yield self
        finally:
            self._preparation.clear()
            if self._pinned is not None:
                self._pinned.stop()

    def _on_planned(self, event: Any) -> None:
        from finetune.cli.plan_command import short

        if event.plan is None:
            view.note(f"No plan of memory and time: {event.reason}")
            return
        if event.plan.speed is not None:
            self._look = replace(self._look, planned_speed=event.plan.speed.tokens_per_second)
        first, *rest = short(event.plan)
        view.err.print(Text(view.hanging(first, 2)), soft_wrap=True)
        for line in rest:
            view.err.print(Text(f"  {view.hanging(line, 4)}", style="dim"), soft_wrap=True)

    def _on_preparing(self, event: Any) -> None:
        self._preparation(event.stage, event.done, event.of)

    def _on_started(self, event: Any) -> None:
        self._preparation.clear()
        counts = event.counts
        first = (
            f"Training {event.trainable:,} of {event.total:,} parameters ({share(event.trainable, event.total)}) on {event.device}: "
            f"{event.steps.total} steps over {counts['training rows']:,} rows, {counts['training tokens']:,} tokens an epoch."
        )
        view.err.print(Text(view.hanging(first, 2)), soft_wrap=True)
        if event.done:
            view.err.print(Text(f"Resuming from step {event.done} of {event.steps.total}."), soft_wrap=True)
        choices = (f"{name}: {value} ({reason})" for name, (value, reason) in event.choices.items())
        for text in (*choices, *self._length(event.steps), *map(_with_whole_pairs, event.notes)):
            view.err.print(Text(f"  {view.hanging(text, 4)}".replace(_HARD_SPACE, " "), style="dim"), soft_wrap=True)
        view.err.print(_groups(event.groups, self._config.optimizer.method))
        self._every = max(1, event.steps.total // _LINES)
        before = RunDirectory(Path(self._config.output)).metric_rows() if event.done else []
        self._figures.start(event.steps.total, event.done, event.device_bytes, (row for row in before if row["step"] <= event.done))
        if is_live(view.err):
            self._pinned = Pinned(view.err, lambda width, height: panel(self._figures, self._look, width, height))
            self._pinned.start()

    def _length(self, steps: Any) -> Iterator[str]:
        """That the epochs end first, where more steps were asked for."""
        asked, epochs = self._config.train.max_steps, self._config.train.epochs
        if asked is not None and asked > steps.total:
            yield f"steps: {steps.total} (`train.epochs: {epochs}` ends before `train.max_steps: {asked}`; more epochs give more steps)"

    def _on_alreadyfinished(self, event: Any) -> None:
        view.path(f"{event.path} is already finished; for another run choose another output")

    def _on_stepdone(self, event: Any) -> None:
        first = self._figures.speed is None
        row = asdict(event)
        self._figures.stepped(row)
        silent = self._clock() - self._spoken
        if self._pinned is None and (first or event.step % self._every == 0 or silent > _LONGEST_SILENCE_S):
            self._print(plain_line(row, self._figures))

    def _on_evaluated(self, event: Any) -> None:
        self._figures.evaluated(event.step, event.validation_loss)
        self._print(f"step {event.step}: validation loss {event.validation_loss:.4f}" + (" (best)" if event.best else ""))

    def _on_sampled(self, event: Any) -> None:
        samples = [asdict(sample) for sample in event.samples]
        self._figures.sampled(event.step, samples)
        for sample in samples if self._pinned is None else ():
            self._print(f"step {event.step}: sample: {ending(sample['prompt'], _SHOWN)} -> {beginning(sample['text'], _SHOWN)}")

    def _on_checkpointsaved(self, event: Any) -> None:
        if event.step:
            self._print(f"step {event.step}: checkpoint saved", style="dim")

    def _on_checkpointdamaged(self, event: Any) -> None:
        self._print(f"{event.path.name} is damaged ({event.reason}); going on from an older one. It now lies at {event.aside}")

    def _on_trackerlost(self, event: Any) -> None:
        self._print(f"{event.name} takes no more figures ({event.reason}); the run goes on, and metrics.jsonl has them all")

    def _print(self, text: str, style: str = "") -> None:
        """One line, which stays one in a pipe."""
        self._spoken = self._clock()
        if self._pinned is not None:
            self._pinned.print(Text(text, style=style))
        else:
            view.err.print(Text(text, style=style), soft_wrap=True)


def share(part: int, whole: int) -> str:
    """``part`` of ``whole`` in percent, with at least two digits that are not zero."""
    percent = 100.0 * part / whole
    return f"{percent:.2f}%" if percent >= 0.1 or not part else f"{percent:.2g}%"


_HARD_SPACE = "\N{NO-BREAK SPACE}"
_WORDS_OF_A_PAIR = 4


def _with_whole_pairs(note: str) -> str:
    """``note`` whose parts after the colon (``q_proj 0.083 -> 0.067``) no line break can divide."""
    heading, colon, rest = note.partition(": ")
    pairs = (pair.replace(" ", _HARD_SPACE) if len(pair.split()) <= _WORDS_OF_A_PAIR else pair for pair in rest.split(", "))
    return heading + colon + ", ".join(pairs)


def group_names(groups: Sequence[dict[str, Any]], method: str) -> list[str]:
    """What the table calls each group: `all` where nothing was told apart by name, and the method of each where AdamW shares the work."""
    names = [str(group["name"]) for group in groups]
    if all(name.startswith(_REST) for name in names):
        names = [name.replace(_REST, "all", 1) for name in names]
    if method in ("muon", "galore"):
        names = [name if name.endswith(_LEFT) else f"{name}, {method}" for name in names]
    return names


def _groups(groups: Sequence[dict[str, Any]], method: str) -> Table:
    table = Table("parameter group", box=None, pad_edge=False)
    for heading in ("tensors", "parameters", "peak lr", "decay"):
        table.add_column(heading, justify="right")
    for name, group in zip(group_names(groups, method), groups, strict=True):
        table.add_row(
            Text(name),
            str(group["tensors"]),
            f"{group['parameters']:,}",
            f"{group['learning_rate']:.2e}",
            f"{group['weight_decay']:g}",
        )
    return table
