"""What a user sees of a run while it trains: how it was set up, then a live bar in a terminal or a line now and then in a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from finetune.cli import view
from finetune.data.shown import shown

if TYPE_CHECKING:
    from finetune.config.schema import Config

_REST, _LEFT = "(rest)", ", AdamW"
"""Beginning and end of the names that the training gives to groups: what no entry matched, and what is left to AdamW."""


class TrainingView:
    """Follows a run of ``config``."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._preparation = view.Preparation()
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}  lr {task.fields[rate]}  {task.fields[speed]} tok/s"),
            TimeRemainingColumn(compact=True),
            console=view.err,
            transient=False,
            expand=True,
        )
        self._task: TaskID | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._every = 1

    def __call__(self, event: Any) -> None:
        """Show one event of the run."""
        handler = getattr(self, f"_on_{type(event).__name__.lower()}")
        handler(event)

    @contextmanager
    def running(self) -> Iterator[TrainingView]:
        """Keep the terminal clean even when the run ends in an error."""
        try:
            yield self
        finally:
            self._preparation.clear()
            if self._task is not None and view.err.is_terminal:  # elsewhere it was never shown
                self._progress.stop()

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
        choices = (f"{name}: {value} ({reason})" for name, (value, reason) in event.choices.items())
        for text in (*choices, *self._length(event.steps), *map(_with_whole_pairs, event.notes)):
            view.err.print(Text(f"  {view.hanging(text, 4)}".replace(_HARD_SPACE, " "), style="dim"), soft_wrap=True)
        view.err.print(_groups(event.groups, self._config.optimizer.method))
        self._every = max(1, event.steps.total // 20)
        self._task = self._progress.add_task("train", total=event.steps.total, completed=event.done, loss="-", rate="-", speed="-")
        if view.err.is_terminal:
            self._progress.start()

    def _length(self, steps: Any) -> Iterator[str]:
        """That the epochs end first, where more steps were asked for."""
        asked, epochs = self._config.train.max_steps, self._config.train.epochs
        if asked is not None and asked > steps.total:
            yield f"steps: {steps.total} (`train.epochs: {epochs}` ends before `train.max_steps: {asked}`; more epochs give more steps)"

    def _on_alreadyfinished(self, event: Any) -> None:
        view.path(f"{event.path} is already finished; for another run choose another output")

    def _on_stepdone(self, event: Any) -> None:
        self._tokens += event.tokens
        self._seconds += event.seconds
        speed = f"{self._tokens / self._seconds:.0f}"
        rate = f"{max(event.learning_rates.values()):.1e}"
        if self._task is not None:
            self._progress.update(self._task, completed=event.step, loss=f"{event.loss:.3f}", rate=rate, speed=speed)
        if not view.err.is_terminal and (event.step % self._every == 0 or event.step == 1):
            view.err.print(f"step {event.step}  loss {event.loss:.4f}  grad norm {event.grad_norm:.3f}  lr {rate}  {speed} tok/s")

    def _on_evaluated(self, event: Any) -> None:
        self._print(f"step {event.step}: validation loss {event.validation_loss:.4f}" + (" (best)" if event.best else ""))

    def _on_sampled(self, event: Any) -> None:
        for sample in event.samples:
            said, answered = (shown(" ".join(text.split()), 60) for text in (sample.prompt, sample.text))
            view.err.print(Text(f"step {event.step}: {said} -> {answered}"), soft_wrap=True)

    def _on_checkpointsaved(self, event: Any) -> None:
        if event.step:
            self._print(f"step {event.step}: checkpoint saved", style="dim")

    def _on_checkpointdamaged(self, event: Any) -> None:
        self._print(f"{event.path.name} is damaged ({event.reason}); going on from an older one. It now lies at {event.aside}")

    def _print(self, text: str, style: str = "") -> None:
        (self._progress.console if view.err.is_terminal else view.err).print(text, style=style)


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
