"""Everything between the configuration and token ids, done once: rows are read, rendered and checked as a stream, and what comes of them
lies in the cache under a key over all that it depends on.

    rows -> chunks of 1,000 -> tokens, checks (in several processes) -> rows.arrow -> split, copies, weights on row numbers -> index
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from finetune.cache import cached
from finetune.config.data import Data, ValidationSplit
from finetune.data.arrange import Arranged, arrange
from finetune.data.checks import findings
from finetune.data.examples import Examples, Rows, Table, open_table
from finetune.data.key import prepared_key, refuse_changed, sources, stamps
from finetune.data.near import SignatureFile
from finetune.data.reading import Progress, read_all
from finetune.data.render import Renderer
from finetune.data.report import BINS, DataReport, SideReport, SourceReport
from finetune.data.rows import Index, Tally, Worker
from finetune.errors import DataError
from finetune.sealed import read_json, write_json

_ROWS, _INDEX, _REPORT = "rows.arrow", "index.safetensors", "report.json"


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What the run learns from and is validated on."""

    train: Examples
    validation: Examples
    report: DataReport
    fingerprint: str
    """sha256 over every example in order: equal fingerprints train on the same tokens."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows read, dropped, truncated and duplicated; tokens and supervised tokens."""
        return self.report.counts


def _unwatched(_stage: str, _done: int, _of: int) -> None:
    """Nobody watches."""


def prepare(data: Data, renderer: Renderer, seed: int, progress: Progress = _unwatched) -> PreparedData:
    """All examples of ``data``, from the cache where they are there; DataError with the first 20 bad rows, and nothing is cached.

    Several processes may ask at once: one works, the others wait and read. To free the disk, remove `prepared` in the cache directory.
    """
    _refuse_validation_weights(data)
    before = stamps(data)
    key = prepared_key(data, renderer, seed)

    def make(directory: Path) -> None:
        _make(directory, Worker(data, renderer, seed), progress)
        refuse_changed(data, renderer, seed, key, before)

    return _load(cached("prepared", key, make))


def _load(directory: Path) -> PreparedData:
    arrays, stored = load_file(directory / _INDEX), read_json(directory / _REPORT)
    table = open_table(directory / _ROWS)

    def side(name: str) -> Examples:
        rows = arrays[name]
        return Examples(table, rows, arrays["length"][rows], arrays["supervised"][rows])

    return PreparedData(side("train"), side("validation"), DataReport.from_dict(stored["report"]), stored["fingerprint"])


def _make(directory: Path, worker: Worker, progress: Progress) -> None:
    """Fill the cache's new ``directory``."""
    data = worker.data
    for killed in directory.parent.glob(f"{directory.name.rsplit('.', 2)[0]}.*.tmp"):  # the lock is ours, so nobody else writes this key
        if killed != directory:
            shutil.rmtree(killed)
    scratch = directory / "scratch"
    near = None if data.near_duplicates == "ignore" else SignatureFile(scratch)
    try:
        index, tallies = read_all(directory / _ROWS, worker, near, progress)
        table = open_table(directory / _ROWS)
        progress("comparing rows", 0, 0)
        arranged = arrange(data, index, near, worker.seed, table.where)
    finally:
        if near is not None:
            near.close()
            shutil.rmtree(scratch, ignore_errors=True)
    sides = {"train": arranged.train, "validation": arranged.validation}
    save_file({**sides, "length": index.length, "supervised": index.supervised}, directory / _INDEX)
    report = _report(data, index, tallies, arranged, table)
    write_json(directory / _REPORT, {"fingerprint": _fingerprint(index, arranged), "report": report.as_dict()})


def _fingerprint(index: Index, arranged: Arranged) -> str:
    digest = hashlib.sha256()
    for rows in (arranged.train, arranged.validation):
        digest.update(len(rows).to_bytes(8, "little"))
        digest.update(index.content[rows].astype("<u8").tobytes())
    return digest.hexdigest()


# --- the report ----------------------------------------------------------------------------------------------------------------------


def _report(data: Data, index: Index, tallies: list[Tally], arranged: Arranged, table: Table) -> DataReport:
    kept = np.zeros_like(index.flags)
    for rows in (arranged.train, arranged.validation):
        kept[rows] = index.flags[rows]
    return DataReport(
        max_tokens=data.max_tokens,
        sources=tuple(_source_report(data, number, index, tally) for number, tally in enumerate(tallies)),
        train=_side_report(index, arranged.train, data.max_tokens),
        validation=_side_report(index, arranged.validation, data.max_tokens),
        findings=(*arranged.findings, *findings(kept, table.where)),
        dropped=arranged.dropped,
    )


def _source_report(data: Data, number: int, index: Index, tally: Tally) -> SourceReport:
    source, mine = sources(data)[number], index.source == number
    return SourceReport(
        source=source.source,
        side="training" if number < len(data.train) else "validation",
        weight=source.weight,
        examples=int(mine.sum()),
        tokens=int(index.length[mine].sum(dtype=np.int64)),
        supervised=int(index.supervised[mine].sum(dtype=np.int64)),
        **asdict(tally),
    )


def _side_report(index: Index, rows: Rows, max_tokens: int) -> SideReport:
    if not len(rows):
        return SideReport()
    lengths = index.length[rows]
    shortest, median, p90, p99, longest = np.quantile(lengths, (0, 0.5, 0.9, 0.99, 1), method="lower").tolist()
    return SideReport(
        examples=len(rows),
        tokens=int(lengths.sum(dtype=np.int64)),
        supervised=int(index.supervised[rows].sum(dtype=np.int64)),
        shortest=shortest,
        median=median,
        p90=p90,
        p99=p99,
        longest=longest,
        histogram=tuple(np.histogram(lengths, bins=BINS, range=(0.5, max_tokens + 0.5))[0].tolist()),
    )


def _refuse_validation_weights(data: Data) -> None:
    """Every validation row counts once, so a weight would be ignored."""
    if data.validation is None or isinstance(data.validation, ValidationSplit):
        return
    for source in data.validation:
        if source.weight != 1.0:
            raise DataError(
                f"a validation source has the weight {source.weight:g}, but every validation row counts once",
                where=source.source,
                fix="remove weight from validation sources",
            )
