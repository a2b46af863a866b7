"""From a chunk of rows to columns of tokens: the work that is done in parallel, and no state that outlives a chunk."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice, pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from finetune.config.data import Data
from finetune.data.checks import Flags, texts_flags, token_flags
from finetune.data.examples import Flat, Ints, Rows
from finetune.data.formats import parse, unused_columns
from finetune.data.near import Signatures, signatures
from finetune.data.overlong import shorten
from finetune.data.records import Record, Row, Text
from finetune.data.render import Example, Renderer
from finetune.errors import DataError, Problem
from finetune.process import collector_at_rest

PROBLEMS = 20
"""Bad rows that are shown; more are only counted."""

COLUMNS = 50
"""Names of unused columns that are counted: a file whose keys are data has millions."""

_NAME_LENGTH = 80

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring rows of one source."""

    source: int
    """Number of the source: those of data.train, then those of data.validation."""
    first: int
    """Number of the first row over all sources."""
    items: Sequence[Row | DataError]
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Index:
    """What is known of every example without reading its tokens: about 60 bytes each."""

    source: npt.NDArray[np.int16]  # (n,)
    row: Rows  # (n,) number of the row it came from; pieces of a row share it
    length: Ints  # (n,) tokens
    supervised: Ints  # (n,) tokens that carry loss
    content: Words  # (n, 2) the first 16 bytes of sha256 over ids and mask
    tokens: Words  # (n, 2) the same over ids alone: what validation must not share with training, whatever carries loss
    draw: Words  # (n,) place in the draw for validation, from the seed and the tokens of the whole row
    flags: Flags  # (n,) bits of `checks.Flag`

    def __len__(self) -> int:
        return len(self.length)

    @classmethod
    def joined(cls, parts: Sequence[Index]) -> Self:
        """All ``parts`` (at least one) end to end."""
        return cls(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(cls)))


@dataclass(slots=True)
class Tally:
    """Rows of one source by what became of them."""

    rows: int = 0
    over_long: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    longest_row: int = 0
    """Tokens of the longest conversation as it was read; documents, which are always cut, do not count."""
    unused: dict[str, int] = field(default_factory=dict)
    """Columns that the format passes over, and how many rows have each; of the first `COLUMNS` names."""

    def add(self, other: Tally) -> None:
        """Add the figures of ``other``."""
        self.longest_row = max(self.longest_row, other.longest_row)
        for name in ("rows", "over_long", "dropped", "truncated", "split"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        merged = Counter(self.unused) + Counter(other.unused)
        self.unused = dict(islice(merged.items(), COLUMNS))


@dataclass(frozen=True, slots=True)
class Worked:
    """What a chunk became."""

    source: int
    batch: Any  # pyarrow.RecordBatch of examples.SCHEMA
    index: Index
    signatures: Signatures | None
    tally: Tally
    problems: tuple[Problem, ...]
    """Of the first `PROBLEMS` bad rows."""
    bad_rows: int


@dataclass(frozen=True, slots=True)
class Worker:
    """Turns chunks into columns; picklable, so that every process has one."""

    data: Data
    renderer: Renderer
    seed: int

    def __call__(self, chunk: Chunk) -> Worked:
        """Parse, render, shorten and check every row; rows that cannot be used become problems."""
        with collector_at_rest():
            return self._work(chunk)

    def _work(self, chunk: Chunk) -> Worked:
        tally, errors = Tally(rows=len(chunk.items)), {}
        numbers: list[int] = []
        records: list[Record] = []
        for number, item in enumerate(chunk.items):
            try:
                records.append(self._parsed(item, chunk))
                numbers.append(number)
            except DataError as error:
                errors[number] = error
        tally.unused = _unused([item for item in chunk.items if isinstance(item, Row)], chunk)
        placed = _Placed()
        for number, record, example in zip(numbers, records, self.renderer.examples(records, self.data.supervise), strict=True):
            try:
                self._place(number + chunk.first, record, example, tally, placed)
            except DataError as error:
                errors[number] = error
        problems = [problem for number in sorted(errors)[:PROBLEMS] for problem in errors[number].problems]
        return self._columns(chunk.source, placed, tally, (tuple(problems), len(errors)))

    def _parsed(self, item: Row | DataError, chunk: Chunk) -> Record:
        if isinstance(item, DataError):
            raise item
        return parse(item, chunk.format, chunk.columns)

    def _place(self, row: int, record: Record, example: Example | DataError, tally: Tally, placed: _Placed) -> None:
        if isinstance(example, DataError):
            raise example
        length = len(example.ids)
        if length > tally.longest_row and not isinstance(record, Text):
            tally.longest_row = length
        if length <= self.data.max_tokens:
            placed.add(row, example, record, record, example)
            return
        pieces = shorten(record, example, self.data, self.renderer)
        tally.over_long += 1
        if not pieces:
            tally.dropped += 1
        elif not isinstance(record, Text) and self.data.overlong == "truncate":
            tally.truncated += 1
        else:
            tally.split += 1
        for piece in pieces:
            placed.add(row, piece.example, piece.record, record if piece.record is None else piece.record, example)

    def _columns(self, source: int, placed: _Placed, tally: Tally, problems: tuple[tuple[Problem, ...], int]) -> Worked:
        flat = Flat.of(placed.examples)
        contents, tokens = _digests(flat)
        # a row that was cut is drawn as a whole, so that its pieces land on one side
        wholes = [
            digest if whole is example else _digests(Flat.of([whole]))[1][0]
            for whole, example, digest in zip(placed.wholes, placed.examples, tokens, strict=True)
        ]
        index = Index(
            source=np.full(len(placed.rows), source, np.int16),
            row=np.array(placed.rows, np.int64),
            length=np.diff(flat.offsets),
            supervised=flat.supervised(),
            content=_words(contents),
            tokens=_words(tokens),
            draw=_draws(wholes, self.seed),
            flags=token_flags(flat) | texts_flags(placed.shown),
        )
        compared = None if self.data.near_duplicates == "ignore" else signatures(placed.compared)
        batch = flat.record_batch([example.where for example in placed.examples])
        return Worked(source, batch, index, compared, tally, *problems)


@dataclass(frozen=True, slots=True)
class _Placed:
    """Pieces as columns: lists that grow together are cheaper than an object for each."""

    rows: list[int] = field(default_factory=list)
    """Numbers of the rows that they came from."""
    examples: list[Example] = field(default_factory=list)
    shown: list[Record | None] = field(default_factory=list)
    """The record that a piece shows; None for the later blocks of a text."""
    compared: list[Record] = field(default_factory=list)
    """The record that is compared for it."""
    wholes: list[Example] = field(default_factory=list)
    """The row's whole example."""

    def add(self, row: int, example: Example, shown: Record | None, compared: Record, whole: Example) -> None:
        """One more piece."""
        self.rows.append(row)
        self.examples.append(example)
        self.shown.append(shown)
        self.compared.append(compared)
        self.wholes.append(whole)


def _unused(rows: Sequence[Row], chunk: Chunk) -> dict[str, int]:
    """Columns that become nothing, each with its number of rows."""
    found: Counter[str] = Counter()
    for names, count in Counter([tuple(row.values) for row in rows]).items():
        for name in unused_columns(names, chunk.format, chunk.columns):
            found[name.encode("utf-8", "backslashreplace").decode()[:_NAME_LENGTH]] += count
    return dict(islice(found.items(), COLUMNS))


def _digests(flat: Flat) -> tuple[list[bytes], list[bytes]]:
    """sha256 over ids and mask of each example, as `Example.content_hash` has it; and over its ids alone."""
    ids, mask = flat.ids.astype("<i4").tobytes(), flat.mask.tobytes()
    contents, tokens = [], []
    for left, right in pairwise(flat.offsets.tolist()):
        digest = hashlib.sha256(ids[4 * left : 4 * right])
        tokens.append(digest.digest())
        digest.update(mask[left:right])
        contents.append(digest.digest())
    return contents, tokens


def _words(digests: Sequence[bytes]) -> Words:
    """(n, 2) the first 16 bytes of each."""
    return np.frombuffer(b"".join([digest[:16] for digest in digests]), "<u8").reshape(-1, 2)


def _draws(digests: Sequence[bytes], seed: int) -> Words:
    """A number below 2**64 for each row, uniform over digests and fixed by the seed."""
    drawn = [hashlib.sha256(f"{seed}:{digest.hex()}".encode()).digest()[:8] for digest in digests]
    return np.frombuffer(b"".join(drawn), ">u8").astype(np.uint64)
