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

import ctypes
import errno
import hashlib
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

MANIFEST = "MANIFEST.json"
_STEP_PREFIX = "step-"
_DAMAGED_PREFIX = "damaged-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """HardwareError where ``path`` cannot be written, be it by Python or by safetensors, which has its own error for a full disk."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        what = getattr(error, "strerror", None) or error
        raise HardwareError(f"cannot write: {what}", where=str(path), fix="free space or choose another output") from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write, which then takes the name ``path`` in one step: a reader never sees a part of the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            _fsync(temporary)
            temporary.replace(path)
            _fsync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step: a reader sees the old file or the new one, never a part."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
    hashes = {}
    for path in sorted(directory.rglob("*")):
        if path.name == MANIFEST:
            continue
        _fsync(path)  # of a directory: the names in it
        if path.is_file():
            hashes[str(path.relative_to(directory))] = sha256_of(path)
    write_json(directory / MANIFEST, {"sha256": hashes})


def verify(directory: Path) -> None:
    """VerificationError unless every file of ``directory`` is there with the sha256 of its manifest, and no other file is."""
    hashes = read_json(directory / MANIFEST).get("sha256")
    if not isinstance(hashes, dict):
        raise VerificationError("the manifest has no hashes", where=str(directory), fix="use another checkpoint")
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir() and path.name != MANIFEST}
    for name in sorted(present | set(hashes)):
        wrong = _wrong(directory / name, hashes.get(name), present=name in present)
        if wrong:
            raise VerificationError(
                f"{name} is not the file that was saved: {wrong}",
                where=str(directory),
                fix="the run's other checkpoints still resume: see --resume",
            )


def _wrong(path: Path, saved: str | None, *, present: bool) -> str:
    """What is wrong with a file of a sealed directory whose manifest says ``saved``; empty where nothing is."""
    if saved is None:
        return "the manifest does not name it"
    if not present:
        return "it is missing"
    if path.is_symlink():
        return "it is a symbolic link"
    try:
        return "" if sha256_of(path) == saved else "its sha256 is another"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"


@contextmanager
def sealed_directory(destination: Path) -> Iterator[Path]:
    """Write a directory so that it is whole or absent.

    Yields a temporary sibling to fill; when the block ends it is sealed and renamed to ``destination`` (replacing an older one). When
    the block raises, the sibling is removed and ``destination`` is untouched.
    """
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(destination):
            temporary.mkdir(parents=True)
            yield temporary
            seal(temporary)
            _put(temporary, destination)
            _fsync(destination.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, destination: Path) -> None:
    """Give ``temporary`` the name ``destination``. What bore it goes: at no instant is there nothing under that name, wherever the
    file system can exchange two names; elsewhere `sweep` gives the name back."""
    if not destination.exists():
        temporary.rename(destination)
    elif not _exchange(temporary, destination):  # else the old one now bears the temporary name, and is removed with it
        old = destination.with_name(f".{destination.name}.{os.getpid()}.old")
        destination.rename(old)
        temporary.rename(destination)
        shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where this system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def remove_directory(directory: Path) -> None:
    """Remove ``directory``: first its name, so that a kill leaves a temporary sibling and not half of a directory."""
    going = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    directory.rename(going)
    shutil.rmtree(going)


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
                _fsync(self.metrics)

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
        _fsync(path)
        _fsync(path.absolute().parent)
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


def require_space(path: Path, needed: int, what: str) -> None:
    """HardwareError unless the disk that holds ``path`` (which need not exist yet) has ``needed`` bytes free for ``what``."""
    place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise HardwareError(
            f"{what} need {_gib(needed)}, and {_gib(free)} are free on the disk",
            where=str(path),
            fix="free space, lower train.checkpoint.keep, or choose another disk with -o output=...",
        )


def bytes_below(directory: Path) -> int:
    """Bytes of all files under ``directory``; 0 where there is none."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


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
