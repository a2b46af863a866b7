"""The run directory: the contract between commands.

    runs/NAME/
      config.yaml  environment.json  plan.json  metrics.jsonl  report.html  doctor.json
      checkpoints/step-00000100/{adapter_model.safetensors, adapter_config.json, optimizer.safetensors, state.json, MANIFEST.json}
      adapter/     final (or best) adapter, tokenizer and chat template; model/ after full tuning
      eval/*.json  figures; eval/items/*.json what they were summed from

Checkpoints, adapters and models are sealed directories (`finetune.sealed`): one without a valid manifest does not exist for any command.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune.errors import ConfigError, HardwareError, VerificationError
from finetune.sealed import fsync, read_json, remove_directory, verify, writing

_STEP_PREFIX = "step-"
_DAMAGED_PREFIX = "damaged-"
FIGURES = "training.json"
"""Beside a result: its step and losses, and the length of the run that made it."""
COMBINED = "combine.json"
"""Beside what `finetune combine` wrote: of what, how, and for which base."""
_ALL = 2**63
"""Steps of a result that does not say them: it was written by a version that could not extend runs."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where each part of a run lies."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, runnable as it is."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, hardware, seeds and fingerprints."""
        return self.path / "environment.json"

    @property
    def plan(self) -> Path:
        """What was decided before the first step, with the reasons."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: steps and evaluations."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The final (or best) adapter in PEFT's format."""
        return self.path / "adapter"

    @property
    def rows(self) -> Path:
        """The tokenized rows that the run is validated on, so that evaluation and merging need no data file."""
        return self.path / "rows.safetensors"

    @property
    def model(self) -> Path:
        """The whole trained model, where full tuning leaves no adapter."""
        return self.path / "model"

    def trained(self) -> Path | None:
        """The sealed result of a finished run, verified: `adapter/` or `model/`; None while there is none."""
        for directory in (self.adapter, self.model):
            if directory.is_dir():
                verify(directory)
                return directory
        return None

    def sessions(self) -> list[dict[str, Any]]:
        """Each start and resumption, with what had changed and what was said of it."""
        found: list[dict[str, Any]] = read_json(self.environment).get("sessions", [])
        return found

    def finished(self) -> Path | None:
        """`trained`, where it is the result of all planned steps; None while a run that was extended goes on, too."""
        result = self.trained()
        if result is None:
            return None
        figures, sessions = read_json(result / FIGURES), len(self.sessions())
        # one that stopped early was let go on since, where it was resumed again
        stopped = bool(figures.get("stopped_early")) and figures.get("sessions", sessions) == sessions
        complete = stopped or int(figures.get("run_steps", _ALL)) >= int(read_json(self.plan)["steps"]["total"])
        return result if complete else None

    def is_finished(self) -> bool:
        """Whether `finished` finds a result that is whole; one that was damaged since is written anew when the run is resumed."""
        with suppress(VerificationError):
            return self.finished() is not None
        return False

    def require_finished(self) -> Path:
        """`finished`; ConfigError where there is more to train."""
        result = self.finished()
        if result is None:
            begun = "its adapter is that of a shorter run, and it goes on" if self.trained() else "it has no adapter"
            fix = f"finish it with `finetune train {self.config} --resume`"
            raise ConfigError(f"the run is not finished: {begun}", where=str(self.path), fix=fix)
        return result

    @property
    def evaluations(self) -> Path:
        """Results of `finetune eval`."""
        return self.path / "eval"

    @property
    def results(self) -> Path:
        """Of these, the one that other commands read: what the run's own evaluation settings found."""
        return self.evaluations / "results.json"

    @property
    def items(self) -> Path:
        """What `results` were summed from."""
        return items_path(self.results)

    @property
    def report(self) -> Path:
        """The self-contained page."""
        return self.path / "report.html"

    def checkpoint(self, step: int) -> Path:
        """Directory of the checkpoint after ``step`` optimizer steps."""
        return self.path / "checkpoints" / f"{_STEP_PREFIX}{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint directory, oldest first; what is in them is not looked at."""
        names = (path.name.removeprefix(_STEP_PREFIX) for path in (self.path / "checkpoints").glob(f"{_STEP_PREFIX}*"))
        return sorted(int(name) for name in names if name.isdigit())

    def newest_checkpoint(self, passed_over: Callable[[Path, VerificationError], None] = lambda *_: None) -> Path | None:
        """The newest checkpoint whose every file verifies; ``passed_over`` is told of each newer one and what is wrong with it."""
        for step in reversed(self.checkpoint_steps()):
            directory = self.checkpoint(step)
            try:
                verify(directory)
            except VerificationError as error:
                passed_over(directory, error)
            else:
                return directory
        return None

    def set_aside(self, directory: Path) -> Path:
        """Rename a damaged checkpoint, so that it is in nobody's way and still there to be looked at; returns its new place."""
        aside = directory.with_name(_DAMAGED_PREFIX + directory.name)
        if aside.exists():
            remove_directory(aside)
        return directory.rename(aside)

    def flush_metrics(self) -> None:
        """Force metrics.jsonl to disk."""
        if self.metrics.is_file():
            with writing(self.metrics):
                fsync(self.metrics)

    def metric_rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line cut short by a kill is left out. VerificationError for any other that is no row."""
        rows, unreadable = self.readable_rows()
        if unreadable:
            raise VerificationError(
                "a line of metrics.jsonl is no JSON: something else wrote to it, or the disk is damaged",
                where=", ".join(f"{self.metrics}:{number}" for number in unreadable[:3]),
                fix="restore the file from a copy, or take the line out",
            )
        return rows

    def readable_rows(self) -> tuple[list[dict[str, Any]], list[int]]:
        """The rows of metrics.jsonl that can be read, and the numbers of the lines that cannot, the last one aside."""
        if not self.metrics.is_file():
            return [], []
        lines = self.metrics.read_bytes().rstrip(b"\n").split(b"\n")
        rows, unreadable = [], []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    unreadable.append(number)
        return rows, unreadable


def items_path(results: Path) -> Path:
    """Where what the figures in the file ``results`` were summed from is kept."""
    return results.parent / "items" / results.name


def recorded_base(result: Path) -> dict[str, Any] | None:
    """What the record beside an adapter says of the model it belongs to: id, revision, fingerprint, quantization, dtype, new_tokens.

    None where there is no record, or it is one of an older version, which does not say how the base was quantized.
    """
    for name in (FIGURES, COMBINED):
        base: dict[str, Any] | None = read_json(result / name).get("base") if (result / name).is_file() else None
        if base is not None and (name == FIGURES or "quantization" in base):
            return base
    return None


def open_run(path: Path) -> RunDirectory:
    """An existing run directory; ConfigError where ``path`` is none."""
    run = RunDirectory(path)
    if not run.config.is_file() or not run.environment.is_file():
        raise ConfigError(
            "not a run directory (config.yaml or environment.json is missing)",
            where=str(path),
            fix="name a directory written by `finetune train`",
        )
    return run


def require_free(path: Path) -> None:
    """ConfigError where something lies at ``path`` already, or nothing can be made there; writes nothing."""
    if path.exists() and not (path.is_dir() and _is_fresh(path)):
        raise ConfigError(
            "the output directory is not empty",
            where=str(path),
            fix="continue that run with --resume, or choose another with -o output=...",
        )
    parent = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{parent} is not a directory that can be written", where=str(path), fix="choose another with -o output=...")


def create_run(path: Path) -> RunDirectory:
    """A new run directory; ConfigError where something lies there already, so that two runs never mix."""
    require_free(path)
    run = RunDirectory(path)
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        fsync(path)
        fsync(path.absolute().parent)
    except OSError as error:
        raise HardwareError(
            f"cannot create the run directory: {error.strerror}", where=str(path), fix="choose another with -o output=..."
        ) from error
    return run


def _is_fresh(path: Path) -> bool:
    """Whether ``path`` is empty, or holds only what a run writes before environment.json, which a kill may have left."""
    names = {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.suffix != ".tmp"}
    records = {"config.yaml", "plan.json", "rows.safetensors", "loftq_base.safetensors", "moved_base.safetensors"}
    return names <= {".lock", "checkpoints", *records}


def sweep(run: RunDirectory) -> None:
    """Remove what killed processes left half-written, and give back names that they took away; only under the run's lock."""
    for folder in (run.path, run.path / "checkpoints"):
        for old in folder.glob(".*.*.old"):
            name = folder / old.name[1:].rsplit(".", 2)[0]
            if not name.exists():
                old.rename(name)
        for left in (*folder.glob(".*.tmp"), *folder.glob(".*.old")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run directory's lock; ConfigError while another process has it, HardwareError where it cannot be made."""
    lock = FileLock(path / ".lock")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            fix = "wait for it, or choose another output"
            raise ConfigError("another process is writing this run", where=str(path), fix=fix) from error
    try:
        yield
    finally:
        lock.release()
