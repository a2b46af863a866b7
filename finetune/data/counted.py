"""What is known of data without preparing it: the figures of an earlier preparation, else lines counted.

An earlier preparation is found by what can be told at once: options, names, sizes and times of files. The cache of prepared data itself
has a stricter key, over bytes and tokenizer, which takes a tokenizer to compute (`finetune.data.key`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.cache import cache_directory
from finetune.config.schema import Config, FileSource, ValidationSplit
from finetune.data.files import CHUNK_BYTES, data_files
from finetune.data.formats import parse
from finetune.data.key import code_hash, sources, stamps
from finetune.data.records import Row, Text
from finetune.data.report import DataReport
from finetune.errors import DataError, HardwareError, VerificationError
from finetune.planning.length import DataCounts
from finetune.sealed import read_json, write_json

_CHEAP_BYTES = 512 * 2**20
"""Of files whose lines are counted while somebody waits: about half a second."""
_OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja")
_WITHOUT_EFFECT = {"processes"}


def note_of(config: Config) -> Path | None:
    """Where the figures of ``config``'s data are noted; None where they changed a moment ago, or are not there."""
    found = stamps(config.data)
    files = sum(isinstance(source, FileSource) for source in sources(config.data))
    if not all(any(stamp) for stamp in found.values()) or (files and not found):
        return None
    parts: dict[str, Any] = {
        "options": config.data.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
        "files": {str(path): stamp for path, stamp in found.items()},
        "model": config.model.model_dump(mode="json"),
        "tokenizer": list(_tokenizer_stamps(Path(config.model.id).expanduser())),
        "seed": config.seed,
        "code": code_hash(),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "counts" / f"{key}.json"


def _tokenizer_stamps(directory: Path) -> Iterator[tuple[str, int, int]]:
    """Of a model that is a directory."""
    for name in _OF_TOKENIZERS:
        with suppress(OSError):
            status = (directory / name).stat()
            yield name, status.st_size, status.st_mtime_ns


def remember(note: Path | None, report: DataReport) -> None:
    """Keep what preparation counted under ``note``, which was asked for before the data was read."""
    if note is None:
        return
    with suppress(HardwareError, OSError):  # a cache that cannot be written costs the plan of tomorrow a figure, and this run nothing
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, asdict(counts_of(report)))


def counts_of(report: DataReport) -> DataCounts:
    """What a plan needs of a preparation's report."""
    train = report.train
    return DataCounts(
        rows=train.examples,
        validation_rows=report.validation.examples,
        origin="prepared with these options",
        exact=True,
        tokens=train.tokens,
        supervised=train.supervised,
        longest=train.longest,
    )


def count(config: Config) -> DataCounts | None:
    """What is known of the data of ``config`` at once; None where only preparing it would tell, or it is not there."""
    note = note_of(config)
    if note is not None and note.is_file():
        with suppress(VerificationError, TypeError):  # a note that another version wrote, or half of one
            return DataCounts(**read_json(note))
    with suppress(DataError, OSError):
        return _counted(config)
    return None


def _counted(config: Config) -> DataCounts | None:
    """Rows of JSON Lines that are conversations; None for all that is not one line a row, and for what takes long to read."""
    validation = () if config.data.validation is None or isinstance(config.data.validation, ValidationSplit) else config.data.validation
    files = {id(source): data_files(source) for source in sources(config.data) if isinstance(source, FileSource)}
    if len(files) < len(sources(config.data)) or sum(path.stat().st_size for each in files.values() for path in each) > _CHEAP_BYTES:
        return None
    if not all(
        _is_a_row_a_line(path, source) for source in sources(config.data) if isinstance(source, FileSource) for path in files[id(source)]
    ):
        return None
    rows = sum(round(source.weight * sum(map(_lines, files[id(source)]))) for source in config.data.train)
    held = sum(map(_lines, (path for source in validation for path in files[id(source)])))
    if isinstance(config.data.validation, ValidationSplit):
        held = round(config.data.validation.fraction * rows)
        rows -= held
    number = sum(map(len, files.values()))
    return DataCounts(
        rows, held, f"lines of {number} file{'s' * (number != 1)}, before duplicates and over-long rows are looked for", exact=False
    )


def _is_a_row_a_line(path: Path, source: FileSource) -> bool:
    """Whether each line of ``path`` becomes one example, as far as its first row tells: texts are cut into blocks."""
    if path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        values = json.loads(first)
    except ValueError:  # preparing will say what is wrong with it
        return False
    return isinstance(values, dict) and not isinstance(parse(Row(values, str(path)), source.format, source.columns), Text)


def _lines(path: Path) -> int:
    """Lines of a file; an unfinished last one counts."""
    total, last = 0, b"\n"
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            total += piece.count(b"\n")
            last = piece[-1:]
    return total + (last != b"\n")
