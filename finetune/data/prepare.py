"""Everything between the configuration and token ids: sources, rendering, policies, the validation split, and counts of it all."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from finetune.config.schema import Data, Icd10cm, Source, ValidationSplit
from finetune.data.formats import Record, parse
from finetune.data.icd10cm import training_rows
from finetune.data.render import Example, Renderer
from finetune.data.sources import Row, read_rows
from finetune.errors import DataError


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What the run learns from and is validated on."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    counts: dict[str, int] = field(default_factory=dict)
    """Rows read, dropped, truncated and duplicated; tokens and supervised tokens."""

    @property
    def fingerprint(self) -> str:
        """sha256 over every example in order: equal fingerprints train on the same tokens."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.validation):
            digest.update(example.content_hash().encode())
        return digest.hexdigest()


def prepare(data: Data, renderer: Renderer, seed: int) -> PreparedData:
    """Read, render and check all data; DataError at the first row that cannot be used."""
    _refuse_validation_weights(data)
    counts: Counter[str] = Counter()
    by_source = [(source, list(_examples(source, data, renderer, counts))) for source in data.train]
    _require_rows(by_source)
    if isinstance(data.validation, ValidationSplit):
        by_source, validation = _split(by_source, data.validation.fraction, seed)
    else:
        validation = [example for source in data.validation or () for example in _examples(source, data, renderer, counts)]
    train = [example for source, examples in by_source for example in _weighted(source, examples, seed)]
    _require(train, validation, data)
    _refuse_overlap(train, validation)
    counts["duplicate rows"] = len(train) - len({example.content_hash() for example in train})
    for name, examples in (("training", train), ("validation", validation)):
        counts[f"{name} rows"] = len(examples)
        counts[f"{name} tokens"] = sum(len(example.ids) for example in examples)
        counts[f"{name} supervised tokens"] = sum(example.supervised for example in examples)
    return PreparedData(tuple(train), tuple(validation), dict(counts))


def _records(source: Source) -> Iterator[Record]:
    if isinstance(source, Icd10cm):
        yield from (parse(Row(row, f"{source.source} row {number}")) for number, row in enumerate(training_rows(source), start=1))
    else:
        yield from (parse(row, source.format) for row in read_rows(source.source))


def _examples(source: Source, data: Data, renderer: Renderer, counts: Counter[str]) -> Iterator[Example]:
    for record in _records(source):
        counts["rows read"] += 1
        example = renderer.example(record, data.supervise)
        if len(example.ids) > data.max_tokens:
            shortened = _shorten(example, data, counts)
            if shortened is None:
                continue
            example = shortened
        yield example


def _shorten(example: Example, data: Data, counts: Counter[str]) -> Example | None:
    if data.overlong == "error":
        raise DataError(
            f"the row has {len(example.ids)} tokens, data.max_tokens is {data.max_tokens}",
            where=example.where,
            fix="raise data.max_tokens, or choose data.overlong: drop | truncate",
        )
    if data.overlong == "drop":
        counts["dropped: over-long"] += 1
        return None
    counts["truncated"] += 1
    cut = Example(example.ids[: data.max_tokens], example.mask[: data.max_tokens], example.where)
    if not cut.supervised:
        raise DataError(
            "truncation leaves no token that carries loss", where=example.where, fix="raise data.max_tokens, or choose data.overlong: drop"
        )
    return cut


_BySource = list[tuple[Source, list[Example]]]


def _split(by_source: _BySource, fraction: float, seed: int) -> tuple[_BySource, list[Example]]:
    """By content hash and before any repetition, so that equal rows land on one side (pitfall A15)."""
    threshold = int(fraction * 2**64)
    kept: _BySource = []
    validation: dict[str, Example] = {}
    for source, examples in by_source:
        rest = []
        for example in examples:
            content = example.content_hash()
            draw = int.from_bytes(hashlib.sha256(f"{seed}:{content}".encode()).digest()[:8], "big")
            if draw < threshold:
                validation.setdefault(content, example)
            else:
                rest.append(example)
        kept.append((source, rest))
    return kept, list(validation.values())


def _weighted(source: Source, examples: list[Example], seed: int) -> Iterable[Example]:
    """Whole repetitions, then a seeded share without replacement; DataError where the weight rounds every row away."""
    whole = int(source.weight)
    share = round((source.weight - whole) * len(examples))
    if examples and not whole and not share:
        raise DataError(
            f"the weight {source.weight:g} of {len(examples)} training row(s) rounds to no row",
            where=source.source,
            fix="raise its weight, or remove the source",
        )
    return [*(examples * whole), *random.Random(f"weight:{seed}").sample(examples, share)]


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


def _require_rows(by_source: _BySource) -> None:
    """Before the split, which may rightly draw all rows of a small source for validation."""
    for source, examples in by_source:
        if not examples:
            raise DataError(
                f"the training source gives no row (weight {source.weight:g}, 0 rows)",
                where=source.source,
                fix="check the file and data.overlong, or remove the source",
            )


def _require(train: list[Example], validation: list[Example], data: Data) -> None:
    sources = ", ".join(source.source for source in data.train)
    if not train:
        raise DataError("no training row is left", where=sources, fix="check data.overlong, weights and the validation fraction")
    if data.validation is not None and not validation:
        raise DataError("no validation row was drawn", where=sources, fix="raise data.validation.fraction, or name validation sources")


def _refuse_overlap(train: list[Example], validation: list[Example]) -> None:
    known = {example.content_hash(): example.where for example in train}
    for example in validation:
        if (where := known.get(example.content_hash())) is not None:
            raise DataError(
                "a validation row is also a training row, so validation would measure memory",
                where=f"{example.where} and {where}",
                fix="remove it from one",
            )
