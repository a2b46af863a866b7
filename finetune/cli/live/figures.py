"""What is known of a run at a moment: the state behind the live view, without any drawing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from finetune.cli.live.sparkline import Trace

_RECENT = 50
"""Steps that the speed is taken over."""


class Figures:
    """Fed with the events of a run; times are seconds of ``clock``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=_RECENT)
        self._first = 0
        self.total = 0
        """Optimizer steps of the whole run."""
        self.step = 0
        self.epoch = 0.0
        self.losses = Trace()
        self.loss: float | None = None
        self.norms = Trace()
        self.norm: float | None = None
        self.validations = Trace()
        self.validation: float | None = None
        self.best: tuple[float, int] | None = None
        """(lowest validation loss, its step)"""
        self.rates: dict[str, float] = {}
        self.memory_bytes = 0
        self.device_bytes = 0
        """Memory of the device; 0 where it is not known."""
        self.sample: tuple[int, str, str] | None = None
        """(step, prompt, answer) of the last sample."""
        self._sampled = 0
        self.clipped = 0
        """Steps whose gradient was longer than `max_norm`."""
        self.counted = 0
        """Steps that `clipped` is out of."""
        self.max_norm: float | None = None

    def start(self, total: int, done: int, device_bytes: int, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """The run has ``done`` of ``total`` steps behind it; ``history``: their rows of metrics.jsonl, of any version."""
        self.total, self.step, self._first, self.device_bytes = total, done, done, device_bytes
        self._began = self._clock()
        for row in history:
            kind = row.get("kind")
            if kind == "step":
                self._curves(row)
            elif kind == "evaluation":
                self.evaluated(int(row["step"]), float(row["validation_loss"]))
            elif kind == "sample":
                self.sampled(int(row["step"]), row["samples"])

    def stepped(self, row: Mapping[str, Any]) -> None:
        """One optimizer step, with the keys of its row."""
        self._curves(row)
        self._recent.append((row["tokens"], row["seconds"], row["input_seconds"]))
        self.step, self.memory_bytes = row["step"], row["memory_bytes"]

    def _curves(self, row: Mapping[str, Any]) -> None:
        self.loss, self.norm, self.epoch, self.rates = row["loss"], row["grad_norm"], row["epoch"], dict(row["learning_rates"])
        self.losses.add(row["loss"])
        self.norms.add(row["grad_norm"])
        self.counted += 1
        self.clipped += self.max_norm is not None and row["grad_norm"] > self.max_norm

    def evaluated(self, step: int, loss: float) -> None:
        """Validation loss after ``step``."""
        self.validation = loss
        self.validations.add(loss)
        if self.best is None or loss < self.best[0]:
            self.best = (loss, step)

    def sampled(self, step: int, samples: Iterable[Mapping[str, str]]) -> None:
        """Answers after ``step``; one is shown, another each time."""
        chosen = list(samples)
        if chosen:
            sample = chosen[self._sampled % len(chosen)]
            self.sample = (step, sample["prompt"], sample["text"])
            self._sampled += 1  # not the step: those are often multiples of how many there are

    @property
    def speed(self) -> float | None:
        """Tokens a second of training over the last steps, validation and samples left out."""
        tokens, seconds, _ = self._sums()
        return tokens / seconds if seconds > 0 else None

    @property
    def waiting(self) -> float | None:
        """Share of the time of the last steps that went into reading rows."""
        _, seconds, waited = self._sums()
        return waited / seconds if seconds > 0 else None

    def _sums(self) -> tuple[float, float, float]:
        recent = list(self._recent)  # another thread may be adding
        return sum(each[0] for each in recent), sum(each[1] for each in recent), sum(each[2] for each in recent)

    @property
    def elapsed(self) -> float:
        """Seconds since this session's first step could begin."""
        return self._clock() - self._began

    @property
    def left(self) -> float | None:
        """Seconds to the end at the pace of this session, validation, checkpoints and samples included; None before its first step."""
        done = self.step - self._first
        return self.elapsed / done * (self.total - self.step) if done else None
