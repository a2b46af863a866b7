"""What prepared data depends on, as one hash: the same key means the same tokens (pitfall A9)."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.config import data as data_section
from finetune.config.data import Data, FileSource, HubSource, Icd10cm, Source, ValidationSplit
from finetune.data.files import data_files
from finetune.data.render import Renderer
from finetune.errors import DataError, Problem
from finetune.sealed import sha256_of

_LIBRARIES = ("datasets", "ftfy", "jinja2", "numpy", "pyarrow", "rensa", "tokenizers", "transformers")
_WITHOUT_EFFECT = {"processes"}


def sources(data: Data) -> tuple[Source, ...]:
    """Those of training, then those of validation; their numbers are used everywhere."""
    validation = () if data.validation is None or isinstance(data.validation, ValidationSplit) else data.validation
    return (*data.train, *validation)


def prepared_key(data: Data, renderer: Renderer, seed: int) -> str:
    """Hexadecimal sha256 over bytes of data, tokenizer, template, options, seed and code; DataError for every file that is missing."""
    problems: list[Problem] = []
    contents = []
    for source in sources(data):
        try:
            contents.append(_content(source))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError.from_problems(problems)
    parts = {
        "options": data.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
        "contents": contents,
        "tokenizer": renderer.tokenizer_hash,
        "template": renderer.template_hash,
        "seed": seed,
        "code": code_hash(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


Stamps = dict[Path, tuple[int, int, int]]  # size, mtime in ns, inode; all 0 for a file that was written a moment ago
_MOMENT_NS = 2 * 10**9  # clocks of file systems tick slowly: a file that is younger may change once more and bear the same time


def stamps(data: Data) -> Stamps:
    """What tells, without reading them, that files are as they were; sources whose files cannot be told are left out."""
    found: Stamps = {}
    for source in sources(data):
        with suppress(DataError, OSError):
            found |= {path: _stamp(path) for path in data_files(source)} if isinstance(source, FileSource) else {}
    return found


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return (0, 0, 0) if time.time_ns() - status.st_mtime_ns < _MOMENT_NS else (status.st_size, status.st_mtime_ns, status.st_ino)


def refuse_changed(data: Data, renderer: Renderer, seed: int, key: str, before: Stamps) -> None:
    """DataError unless the files are those that ``key`` was made of; they are hashed again only where stamps do not tell."""
    now = stamps(data)
    doubtful = [path for path in sorted(before.keys() | now.keys()) if before.get(path) != now.get(path) or not any(now[path])]
    if doubtful and _key_or_none(data, renderer, seed) != key:
        raise DataError(
            "the data changed while it was read", where=", ".join(map(str, doubtful[:3])), fix="start again when nothing writes to it"
        )


def _key_or_none(data: Data, renderer: Renderer, seed: int) -> str | None:
    try:
        return prepared_key(data, renderer, seed)
    except DataError:  # a file that is gone
        return None


def _content(source: Source) -> Any:
    """What stands behind a source's name. The names themselves are among the options: they are part of every row's place."""
    match source:
        case FileSource():
            return [(str(path), sha256_of(path)) for path in data_files(source)]
        case Icd10cm():
            try:
                version = metadata.version("simple-icd-10-cm")
                return [version, platform.python_version()] if source.replay else version  # Python's own documentation is replayed
            except metadata.PackageNotFoundError:
                return "not installed"  # reading it says what to do
        case HubSource():
            return source.revision


@cache
def code_hash() -> str:
    """sha256 over the source of this package and of its configuration."""
    digest = hashlib.sha256()
    for path in sorted([*Path(__file__).parent.glob("*.py"), Path(data_section.__file__)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
