"""General English and general knowledge, to measure what a run makes the model forget (arm K of the benchmark)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from finetune.data.records import Text
from finetune.data.render import Example, Renderer
from finetune.errors import DataError

_BLOCK = 512


@dataclass(frozen=True, slots=True)
class GeneralQuestion:
    """A question that an untuned model mostly answers, with one right and three wrong answers."""

    question: str
    answer: str
    distractors: tuple[str, str, str]


def general_text() -> str:
    """About 2,000 tokens (8,600 characters) of plain English in paragraphs, which no model was trained on."""
    return (resources.files("finetune.data") / "texts" / "general.txt").read_text(encoding="utf-8")


def general_blocks(renderer: Renderer) -> list[Example]:
    """The general text in pieces of at most 512 tokens; each piece's first token is context only."""
    ids = renderer.example(Text(general_text(), "general text")).ids
    return [_piece(ids[start : start + _BLOCK]) for start in range(0, len(ids) - 1, _BLOCK)]


def _piece(ids: tuple[int, ...]) -> Example:
    return Example(ids, (False, *(True for _ in ids[1:])), "general text")


def general_questions() -> tuple[GeneralQuestion, ...]:
    """24 four-way questions, answered in whole sentences, in a fixed order."""
    rows = json.loads((resources.files("finetune.data") / "texts" / "general_questions.json").read_text(encoding="utf-8"))
    return tuple(GeneralQuestion(row["question"], row["answer"], _three(row["distractors"])) for row in rows)


def _three(distractors: list[str]) -> tuple[str, str, str]:
    first, second, third = distractors
    return first, second, third


def replay_passages(seed: int) -> Iterator[str]:
    """Passages of the documentation that Python carries, each of 200 to 600 characters, shuffled; not what forgetting is measured on.

    Raises DataError where this Python carries none.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise DataError(
            "this Python comes without its documentation (pydoc_data), which `replay` reads",
            where="data.train",
            fix="install the whole standard library, or set `replay: 0`",
        ) from error
    passages = {
        passage for text in topics.values() for passage in (part.strip() for part in text.split("\n\n")) if 200 <= len(passage) <= 600
    }
    yield from sorted(passages, key=lambda passage: hashlib.sha256(f"{seed}/{passage}".encode()).hexdigest())
