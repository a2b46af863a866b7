"""Loss and perplexity: of the run's validation rows, or of rows of the task's own.

Every supervised token counts the same, however rows are batched (pitfall A16); an interval draws whole rows, or blocks of a plain text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Literal

from finetune.config.data import Data
from finetune.config.schema import LossTask
from finetune.data.overlong import shorten
from finetune.data.records import Record, Text
from finetune.data.render import Example, Renderer
from finetune.errors import DataError, Problem
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.measured_rows import record_windows
from finetune.evaluation.statistics import ratio
from finetune.scoring import Scorer

Advance = Callable[[int], None]


def measure_validation(scorer: Scorer, name: str, rows: Sequence[Example], advance: Advance) -> Measurement:
    """Of tokenized ``rows``."""
    nats, tokens = _zeros("d", len(rows)), _zeros("q", len(rows))
    for row, losses in scorer.losses(rows, advance):
        nats[row], tokens[row] = float(losses.sum()), len(losses)
    return _measurement(name, nats, tokens)


def measure_rows(scorer: Scorer, renderer: Renderer, name: str, task: LossTask, advance: Advance) -> Measurement:
    """Of the rows that ``task`` names; DataError where one cannot be used."""
    assert task.data is not None
    data = Data(train=(task.data,), max_tokens=task.max_tokens, supervise=task.supervise, overlong=task.overlong)
    nats, tokens = _zeros("d", 0), _zeros("q", 0)
    for records in record_windows(task.data):
        examples, items = _examples(records, data, renderer)
        found = [[0.0, 0] for _ in range(max(items, default=-1) + 1)]
        for place, losses in scorer.losses(examples, advance):
            found[items[place]][0] += float(losses.sum())
            found[items[place]][1] += len(losses)
        nats.extend(item[0] for item in found)
        tokens.extend(int(item[1]) for item in found)
    if not nats:
        raise DataError("no row is left to measure", where=task.data.source, fix="raise `max_tokens`, or choose another `overlong`")
    return _measurement(name, nats, tokens)


def _examples(records: Sequence[Record], data: Data, renderer: Renderer) -> tuple[list[Example], list[int]]:
    """What is scored, and of each the number of its item: a conversation is one, however it was cut, a text as many as it has blocks."""
    examples: list[Example] = []
    items: list[int] = []
    problems: list[Problem] = []
    for record, example in zip(records, renderer.examples(records, data.supervise), strict=True):
        try:
            pieces = _pieces(record, example, data, renderer)
        except DataError as error:
            problems.extend(error.problems)
            continue
        first = items[-1] + 1 if items else 0
        examples += pieces
        items += [first + number if isinstance(record, Text) else first for number in range(len(pieces))]
    if problems:
        raise DataError.from_problems(problems)
    return examples, items


def _pieces(record: Record, example: Example | DataError, data: Data, renderer: Renderer) -> list[Example]:
    if isinstance(example, DataError):
        raise example
    if len(example.ids) <= data.max_tokens:
        return [example]
    return [piece.example for piece in shorten(record, example, data, renderer)]


def _zeros(code: Literal["d", "q"], count: int) -> array[Any]:
    """Numbers side by side, without an object each: float64 or int64."""
    return array(code, bytes(8 * count))


def _measurement(name: str, nats: array[Any], tokens: array[Any]) -> Measurement:
    rows = range(len(nats))
    return Measurement(
        (
            ratio(f"{name}: loss", "nats/token", "lower", (nats, tokens), rows),
            ratio(f"{name}: perplexity", "", "lower", (nats, tokens), rows, "exp"),
        )
    )
