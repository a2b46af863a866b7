"""Which examples are trained on, how often, and which validate: decisions on arrays of row numbers, after all rows are known.

In this order: copies between the sides are refused, the validation split is drawn by content before anything is repeated (pitfall A15),
copies inside the training side are kept or dropped, and at last weights repeat what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from finetune.config.data import Data, Source, ValidationSplit
from finetune.data.checks import PLACES
from finetune.data.examples import Rows
from finetune.data.near import SignatureFile, repeated
from finetune.data.report import Finding
from finetune.data.rows import PROBLEMS, Index, Words
from finetune.errors import DataError, Problem

_WEIGHT_STREAM = 0x77656967  # sets the draws for weights apart from all others of the same seed
_NEAR_ADVICE = "share most of their word sequences: see data.near_duplicates"
_LEAK_ADVICE = "validation may measure memory: name validation sources of another origin, or remove these rows"


@dataclass(slots=True)
class Arranged:
    """Row numbers of both sides in their order, and what was found on the way."""

    train: Rows
    validation: Rows
    findings: list[Finding] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, out: npt.NDArray[np.bool_]) -> None:
        """Leave out the training rows that ``out`` (over all rows) marks."""
        kept = self.train[~out[self.train]]
        if len(kept) < len(self.train):
            self.dropped[reason] = len(self.train) - len(kept)
        self.train = kept


@dataclass(frozen=True, slots=True)
class _Rows:
    """All rows, and how to name them."""

    index: Index
    equal: Rows  # (n,) the first of all rows with the same ids and mask
    tokens: Rows  # (n,) the first of all rows with the same ids
    where: Callable[[int], str]

    def places(self, pairs: list[tuple[int, int]]) -> tuple[str, ...]:
        return tuple(f"{self.where(left)} and {self.where(right)}" for left, right in pairs)


def arrange(data: Data, index: Index, near: SignatureFile | None, seed: int, where: Callable[[int], str]) -> Arranged:
    """Both sides of ``index``; DataError where a side is empty or shares a row with the other."""
    equal = _first_equal(index.content)
    rows = _Rows(index, equal, equal if data.validation is None else _first_equal(index.tokens), where)
    _require_rows(data, index)
    arranged = _split(data, rows)
    _handle_duplicates(data, rows, arranged)
    if near is not None:
        _handle_near(data, rows, arranged, near)
    by_source = [arranged.train[index.source[arranged.train] == number] for number in range(len(data.train))]
    weighted = [_weighted(number, data.train[number], mine, seed) for number, mine in enumerate(by_source)]
    left_out = sum(len(mine) - len(drawn) for mine, drawn in zip(by_source, weighted, strict=True) if len(drawn) < len(mine))
    if left_out:
        arranged.dropped["drawn by no weight"] = left_out
    arranged.train = np.concatenate(weighted)
    _require(data, arranged)
    return arranged


def _first_equal(content: Words) -> Rows:
    """(n,) for each row the first with the same content."""
    order = np.lexsort((content[:, 1], content[:, 0]))  # stable: equal rows stay in their order
    ordered = content[order]
    begins = np.concatenate([[True], np.any(ordered[1:] != ordered[:-1], axis=1)])[: len(order)]
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    return first


def _first_within(side: Rows, groups: Rows) -> Rows:
    """(len(side),) for each row of ``side``, which ascends, the first of the same group that is on this side as well."""
    _, first, group = np.unique(groups[side], return_index=True, return_inverse=True)
    return side[first][group]


def _split(data: Data, rows: _Rows) -> Arranged:
    everything = np.arange(len(rows.index), dtype=np.int64)
    trains = rows.index.source < len(data.train)
    if not isinstance(data.validation, ValidationSplit):
        arranged = Arranged(everything[trains], everything[~trains])
        _refuse_overlap(rows, arranged)
        return arranged
    threshold = np.uint64(int(data.validation.fraction * 2**64))
    drawn = rows.index.draw < threshold
    train, validation = everything[~drawn], everything[drawn]
    # every content once; a piece of a cut row may equal one on the training side, though their rows differ
    once = (_first_within(validation, rows.equal) == validation) & ~np.isin(rows.tokens[validation], rows.tokens[train])
    dropped = {"validation copy": int((~once).sum())} if not once.all() else {}
    return Arranged(train, validation[once], dropped=dropped)


def _refuse_overlap(rows: _Rows, arranged: Arranged) -> None:
    known, position = np.unique(rows.tokens[arranged.train], return_index=True)
    shared = np.flatnonzero(np.isin(rows.tokens[arranged.validation], known))
    if not len(shared):
        return
    problems = []
    for number in arranged.validation[shared[:PROBLEMS]]:
        twin = arranged.train[position[np.searchsorted(known, rows.tokens[number])]]
        problems.append(
            Problem(
                "a validation row is also a training row, so validation would measure memory",
                f"{rows.where(int(number))} and {rows.where(int(twin))}",
                "remove it from one",
            )
        )
    raise DataError.from_problems(with_rest(problems, len(shared), "validation rows that are also training rows"))


def with_rest(problems: list[Problem], count: int, what: str) -> list[Problem]:
    """``problems``, and a last one that tells how many of ``count`` are not shown."""
    rest = count - min(count, PROBLEMS)
    return [*problems, Problem(f"... and {rest} more {what}")] if rest else problems


def _handle_duplicates(data: Data, rows: _Rows, arranged: Arranged) -> None:
    first = _first_within(arranged.train, rows.equal)
    again = np.flatnonzero(first != arranged.train)
    if not len(again):
        return
    copies = arranged.train[again]
    pairs = [(int(arranged.train[number]), int(first[number])) for number in again[:PROBLEMS]]
    if data.duplicates == "error":
        problems = [Problem("two training rows are equal token by token", place, "remove one") for place in rows.places(pairs)]
        raise DataError.from_problems(with_rest(problems, len(copies), "equal rows"))
    arranged.findings.append(
        Finding("duplicate rows", len(copies), rows.places(pairs[:PLACES]), "equal token by token: see data.duplicates")
    )
    if data.duplicates == "drop":
        out = np.zeros(len(rows.index), dtype=bool)
        out[copies] = True
        arranged.drop("duplicate", out)


def _handle_near(data: Data, rows: _Rows, arranged: Arranged, near: SignatureFile) -> None:
    """Among rows that are not equal: equal ones are counted apart."""

    def same(left: Rows, right: Rows) -> npt.NDArray[np.bool_]:
        equal: npt.NDArray[np.bool_] = (rows.index.row[left] == rows.index.row[right]) | (rows.equal[left] == rows.equal[right])
        return equal

    first = _first_within(arranged.train, rows.equal)
    distinct = arranged.train[first == arranged.train]
    close, leaked = near.partners(distinct, arranged.validation, same)
    if len(leaked):
        _, once = np.unique(leaked, return_index=True)
        pairs = [(int(leaked[number]), int(close[number])) for number in once[:PLACES]]
        arranged.findings.append(Finding("validation rows near training rows", len(once), rows.places(pairs), _LEAK_ADVICE))
    earlier, later = near.partners(distinct, distinct, same)
    out = repeated(earlier, later, len(rows.index))
    marked = np.flatnonzero(out)
    if not len(marked):
        return
    pairs = [(int(row), int(earlier[np.flatnonzero(later == row)[0]])) for row in marked[:PLACES]]
    arranged.findings.append(Finding("near-duplicate rows", len(marked), rows.places(pairs), _NEAR_ADVICE))
    if data.near_duplicates == "drop":
        out[arranged.train] = out[first]  # with the copies of each
        arranged.drop("near duplicate", out)


def _weighted(number: int, source: Source, rows: Rows, seed: int) -> Rows:
    """Whole repetitions, then a seeded share without replacement; DataError where the weight rounds every row away."""
    whole = int(source.weight)
    share = round((source.weight - whole) * len(rows))
    if len(rows) and not whole and not share:
        raise DataError(
            f"the weight {source.weight:g} of {len(rows)} training row(s) rounds to no row",
            where=source.source,
            fix="raise its weight, or remove the source",
        )
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _WEIGHT_STREAM, number])))
    return np.concatenate([np.tile(rows, whole), rows[np.sort(generator.permutation(len(rows))[:share])]])


def _require_rows(data: Data, index: Index) -> None:
    """Before the split, which may rightly draw all rows of a small source for validation."""
    present = set(np.unique(index.source).tolist())
    for number, source in enumerate(data.train):
        if number not in present:
            raise DataError(
                f"the training source gives no row (weight {source.weight:g}, 0 rows)",
                where=source.source,
                fix="check the file and data.overlong, or remove the source",
            )


def _require(data: Data, arranged: Arranged) -> None:
    sources = ", ".join(source.source for source in data.train)
    if not len(arranged.train):
        raise DataError("no training row is left", where=sources, fix="check data.overlong, weights and the validation fraction")
    if data.validation is not None and not len(arranged.validation):
        raise DataError("no validation row was drawn", where=sources, fix="raise data.validation.fraction, or name validation sources")
