"""Free answers to rows of the user's, compared with the answers that stand there."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.config.figure_names import METRICS
from finetune.config.schema import GenerateTask
from finetune.data.records import Message, Record, Text
from finetune.data.render import Renderer
from finetune.errors import DataError
from finetune.evaluation.comparison import Measurement
from finetune.evaluation.extras import require
from finetune.evaluation.generation import Answer, Decoding, continuations, is_exact, token_f1
from finetune.evaluation.measured_rows import record_windows
from finetune.evaluation.statistics import mean
from finetune.scoring import Scorer

Metric = Callable[[str, str], float]
"""(given, expected) -> from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Question:
    """One row: what is asked, and what is expected."""

    prompt: tuple[int, ...]
    shown: str
    """The last thing that was said before the answer."""
    expected: str


@dataclass(slots=True)
class _Found:
    """One entry an answer: all that is kept of it, but for the first few."""

    values: dict[str, array[float]]
    ended: array[int] = field(default_factory=lambda: array("b"))
    answers: dict[tuple[str, str, str], str] = field(default_factory=dict)


def measure(
    scorer: Scorer, renderer: Renderer, name: str, task: GenerateTask, *, samples: int, advance: Callable[[int], None]
) -> Measurement:
    """Every metric of ``task``, the share of answers that ended themselves, and the first ``samples`` answers."""
    metrics = metrics_of(task)
    decoding = Decoding(task.max_new_tokens, task.temperature, task.top_p, task.seed, task.stop)
    found = _Found({metric: array("d") for metric in metrics})
    for records in record_windows(task.data):
        questions = [question(renderer, record, chat=task.style == "chat") for record in records]
        answers = continuations(scorer, renderer, [one.prompt for one in questions], decoding, advance)
        _add(found, metrics, list(zip(questions, answers, strict=True)), name, samples)
    rows = range(len(found.ended))
    quantities = [mean(f"{name}: {METRICS[metric]}", "share", "higher", values, rows) for metric, values in found.values.items()]
    return Measurement((*quantities, mean(f"{name}: ended by itself", "share", "same", found.ended, rows)), found.answers)


def _add(found: _Found, metrics: dict[str, Metric], pairs: Sequence[tuple[Question, Answer]], name: str, samples: int) -> None:
    for asked, given in pairs:
        for metric, function in metrics.items():
            found.values[metric].append(function(given.text, asked.expected))
        found.ended.append(given.ended)
        if len(found.answers) < samples:
            found.answers[name, asked.shown, asked.expected] = given.text


def question(renderer: Renderer, record: Record, *, chat: bool) -> Question:
    """The row's last answer as what is expected, and all before it as the prompt; DataError where it has none."""
    if isinstance(record, Text):
        raise DataError(
            "a plain text asks nothing", where=record.where, fix="use rows with a question and an answer, or the task `loss` for texts"
        )
    last = max((number for number, message in enumerate(record.messages) if message.role == "assistant"), default=0)
    before, expected = record.messages[:last], record.messages[last].content
    if not before or not expected.strip():
        raise DataError("the row has no question before its last answer, or the answer is empty", where=record.where, fix="remove the row")
    if chat:
        return Question(renderer.prompt(before, record.where, record.tools), before[-1].content, expected)
    return Question(_plain(renderer, before, record.where), before[-1].content, expected)


def _plain(renderer: Renderer, before: Sequence[Message], where: str) -> tuple[int, ...]:
    if len(before) > 1:
        raise DataError("several turns before the answer have no form as plain text", where=where, fix="use `style: chat`")
    return tuple(renderer.tokenizer(before[0].content)["input_ids"])


# --- metrics -------------------------------------------------------------------------------------------------------------------------


def metrics_of(task: GenerateTask) -> dict[str, Metric]:
    """The metrics that ``task`` names; HardwareError where a library is missing."""
    return {name: _METRICS[name](task) for name in dict.fromkeys(task.metrics)}


def _exact(_: GenerateTask) -> Metric:
    return lambda given, expected: float(is_exact(given, expected))


def _f1(_: GenerateTask) -> Metric:
    return token_f1


def _rouge(_: GenerateTask) -> Metric:
    scorer: Any = require("rouge_score.rouge_scorer", "the metric rouge-l").RougeScorer(["rougeL"], use_stemmer=False)
    return lambda given, expected: float(scorer.score(expected, given)["rougeL"].fmeasure)


def _chrf(_: GenerateTask) -> Metric:
    """Of each answer on its own, since only means over answers have intervals by answer; sacrebleu's corpus chrF weighs long ones more."""
    scorer: Any = require("sacrebleu", "the metric chrf").CHRF()
    return lambda given, expected: float(scorer.sentence_score(given, [expected]).score) / 100


def _regex(task: GenerateTask) -> Metric:
    pattern = re.compile(task.pattern or "")
    return lambda given, _: float(pattern.search(given) is not None)


def _json(_: GenerateTask) -> Metric:
    return lambda given, _expected: float(_is_json(given))


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)  # NaN and Infinity are Python's, not JSON's
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(word: str) -> None:
    raise ValueError(word)


_METRICS: dict[str, Callable[[GenerateTask], Metric]] = {
    "exact-match": _exact,
    "token-f1": _f1,
    "rouge-l": _rouge,
    "chrf": _chrf,
    "regex": _regex,
    "json": _json,
}
