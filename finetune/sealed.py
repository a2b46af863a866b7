"""How files and directories reach the disk so that a kill never leaves half of one.

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.errors import HardwareError, VerificationError

MANIFEST = "MANIFEST.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Force a file, or the names in a directory, to disk."""
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
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
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
        fsync(path)  # of a directory: the names in it
        if path.is_file():
            hashes[str(path.relative_to(directory))] = sha256_of(path)
    write_json(directory / MANIFEST, {"sha256": hashes})


COPY_AGAIN = "copy the adapter again from where it was trained"
"""What to do about a sealed adapter that is not as it was written."""


def verify(directory: Path, fix: str = "the run's other checkpoints still resume: see --resume") -> None:
    """VerificationError, with ``fix``, unless every file of ``directory`` has the sha256 of its manifest, and there is no other."""
    hashes = read_json(directory / MANIFEST).get("sha256")
    if not isinstance(hashes, dict):
        raise VerificationError("the manifest has no hashes", where=str(directory), fix=fix)
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir() and path.name != MANIFEST}
    for name in sorted(present | set(hashes)):
        wrong = _wrong(directory / name, hashes.get(name), present=name in present)
        if wrong:
            raise VerificationError(
                f"{name} is not the file that was saved: {wrong}",
                where=str(directory),
                fix=fix,
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
            fsync(destination.parent)
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
    with writing(directory):
        directory.rename(going)
        shutil.rmtree(going)


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
