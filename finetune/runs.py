"""The run directory: the contract between commands, and how files reach the disk so that a kill never leaves half of one.

    runs/NAME/
      config.yaml  environment.json  plan.json  metrics.jsonl  report.html
      checkpoints/step-00000100/{adapter_model.safetensors, adapter_config.json, optimizer.safetensors, state.json, MANIFEST.json}
      adapter/     final (or best) adapter, tokenizer and chat template; model/ after full tuning
      eval/*.json

A directory is sealed by MANIFEST.json, which holds the sha256 of every other file and is written last. A directory without a valid
manifest does not exist for any command.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune.errors import ConfigError, HardwareError, VerificationError

MANIFEST = "MANIFEST.json"
_STEP_PREFIX = "step-"


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise HardwareError(f"cannot write: {error.strerror}", where=str(path), fix="free space or choose another output") from error


def write_json(path: Path, value: object) -> None:
    """``value`` as indented JSON, replaced in one step. NaN and infinity are refused, since they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; VerificationError where it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerificationError(f"cannot read {path.name}: {error}", where=str(path.parent), fix="name a finished run directory") from error
    if not isinstance(value, dict):
        raise VerificationError(f"{path.name} is not a JSON object", where=str(path.parent), fix="name a finished run directory")
    return value


# --- sealed directories --------------------------------------------------------------------------------------------------------------


def seal(directory: Path) -> None:
    """Force every file of ``directory`` to disk, then write its manifest."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    hashes = {}
    for path in files:
        _fsync(path)
        hashes[str(path.relative_to(directory))] = sha256_of(path)
    write_json(directory / MANIFEST, {"sha256": hashes})


def verify(directory: Path) -> None:
    """VerificationError unless every file of ``directory`` is there with the sha256 of its manifest, and no other file is."""
    hashes = read_json(directory / MANIFEST).get("sha256")
    if not isinstance(hashes, dict):
        raise VerificationError("the manifest has no hashes", where=str(directory), fix="use another checkpoint")
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir() and path.name != MANIFEST}
    for name in sorted(present | set(hashes)):
        path = directory / name
        if name not in hashes or name not in present or path.is_symlink() or sha256_of(path) != hashes[name]:
            raise VerificationError(
                f"{name} is not the file that was saved", where=str(directory), fix="the run's other checkpoints still resume: see --resume"
            )


@contextmanager
def sealed_directory(destination: Path) -> Iterator[Path]:
    """Write a directory so that it is whole or absent.

    Yields a temporary sibling to fill; when the block ends it is sealed and renamed to ``destination`` (replacing an older one). When
    the block raises, the sibling is removed and ``destination`` is untouched.
    """
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        seal(temporary)
        if destination.exists():
            old = destination.with_name(f".{destination.name}.{os.getpid()}.old")
            destination.rename(old)
            temporary.rename(destination)
            shutil.rmtree(old)
        else:
            temporary.rename(destination)
        _fsync(destination.parent)
    except OSError as error:
        raise HardwareError(
            f"cannot write: {error.strerror or error}", where=str(destination), fix="free space or choose another output"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- the run directory ---------------------------------------------------------------------------------------------------------------


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

    @property
    def evaluations(self) -> Path:
        """Results of `finetune eval`."""
        return self.path / "eval"

    @property
    def report(self) -> Path:
        """The self-contained page."""
        return self.path / "report.html"

    def checkpoint(self, step: int) -> Path:
        """Directory of the checkpoint after ``step`` optimizer steps."""
        return self.path / "checkpoints" / f"{_STEP_PREFIX}{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint directory with a manifest, oldest first; their contents are not verified."""
        folder = self.path / "checkpoints"
        if not folder.is_dir():
            return []
        names = (path.name.removeprefix(_STEP_PREFIX) for path in folder.glob(f"{_STEP_PREFIX}*") if (path / MANIFEST).is_file())
        return sorted(int(name) for name in names if name.isdigit())

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint whose every file verifies; damaged ones are passed over."""
        for step in reversed(self.checkpoint_steps()):
            directory = self.checkpoint(step)
            with suppress(VerificationError):
                verify(directory)
                return directory
        return None

    def metric_rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line cut short by a kill is left out."""
        if not self.metrics.is_file():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
        return rows


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
    except OSError as error:
        raise HardwareError(
            f"cannot create the run directory: {error.strerror}", where=str(path), fix="choose another with -o output=..."
        ) from error
    return run


def _is_fresh(path: Path) -> bool:
    """Whether ``path`` is empty, or holds only what a run writes before environment.json, which a kill may have left."""
    names = {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.suffix != ".tmp"}
    return names <= {".lock", "checkpoints", "config.yaml", "plan.json", "loftq_base.safetensors", "rows.safetensors"}


def sweep(run: RunDirectory) -> None:
    """Remove what killed processes left half-written; only under the run's lock."""
    for folder in (run.path, run.path / "checkpoints"):
        for left in (*folder.glob(".*.tmp"), *folder.glob(".*.old")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run directory's lock; ConfigError while another process has it."""
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError("another process is writing this run", where=str(path), fix="wait for it, or choose another output") from error
    try:
        yield
    finally:
        lock.release()
