"""The work that every tool does: chats about ICD-10-CM of varied length, one .jsonl for training and one for validation.

Lengths are the quantiles of a lognormal distribution, so that every seed and number of rows has the same short middle and long tail.
Every row is another heading of the classification, and what is said of it is what the classification says.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

ROWS = 600
VALIDATION_ROWS = 60
MEDIAN_CHARACTERS = 85
"""Of a row's words; the chat template adds 31 tokens to a row."""
SIGMA = 1.1
ASKED_SHARE = (0.1, 0.4)
"""Least and greatest share of a row's words that the user speaks, which carry no loss."""

Row = dict[str, list[dict[str, str]]]


@dataclass(frozen=True, slots=True)
class Files:
    """Where the rows are."""

    train: Path
    validation: Path


def lengths(rows: int, generator: random.Random, scale: int = 1) -> list[int]:
    """Characters of each row: the (i + 1/2)/rows quantiles of a lognormal distribution, shuffled. ``scale`` multiplies them."""
    normal = NormalDist(math.log(MEDIAN_CHARACTERS * scale), SIGMA)
    found = [round(math.exp(normal.inv_cdf((index + 0.5) / rows))) for index in range(rows)]
    generator.shuffle(found)
    return found


def conversation(heading: str, facts: Iterator[str], characters: int, asked_share: float) -> Row:
    """A question about ``heading`` and an answer, together about ``characters`` long, cut at the end of a fact.

    The user tells what is known before asking where ``asked_share`` leaves room for it.
    """
    question = f"Describe {heading}."
    told = _fill(facts, round(characters * asked_share) - len(question))
    if told:
        question = f"The chart says: {' '.join(told)} {question}"
    answer = _fill(facts, characters - len(question)) or [next(facts)]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join(answer)}]}


def _fill(facts: Iterator[str], characters: int) -> list[str]:
    """Facts until ``characters`` are reached; none where there is no room for half of one."""
    taken: list[str] = []
    while characters > 30:
        taken.append(next(facts))
        characters -= len(taken[-1]) + 1
    return taken


def rows(headings: Sequence[str], facts_of: Callable[[str], Iterator[str]], count: int, *, seed: int, scale: int = 1) -> list[Row]:
    """``count`` rows on the first headings, with the lengths of `lengths`."""
    generator = random.Random(seed)
    sizes = lengths(count, generator, scale)
    return [
        conversation(heading, facts_of(heading), size, generator.uniform(*ASKED_SHARE))
        for heading, size in zip(headings[:count], sizes, strict=True)
    ]


def classification_rows(train: int, validation: int, *, seed: int = 0, scale: int = 1) -> tuple[list[Row], list[Row]]:
    """Rows from the whole classification; no heading is asked twice."""
    import simple_icd_10_cm as icd

    def described(code: str) -> str:
        return str(icd.get_description(code))

    codes = [code for code in icd.get_all_codes() if len(code) == 3 and code[1].isdigit()]
    random.Random(seed).shuffle(codes)

    def facts_of(heading: str) -> Iterator[str]:
        """What stands under the heading, then under the headings that follow it in the classification's order."""
        start = ordered.index(by_title[heading])
        for code in ordered[start:] + ordered[:start]:
            for below in (code, *icd.get_descendants(code)):
                yield f"{below} is {described(below)}."
                yield from (f"It includes {term}." for term in icd.get_inclusion_term(below))

    ordered = sorted(codes)
    by_title = {described(code): code for code in codes}
    headings = list(dict.fromkeys(map(described, codes)))
    if len(headings) < train + validation:
        raise SystemExit(f"the classification has {len(headings)} headings, not the {train + validation} that rows are asked for")
    return (
        rows(headings, facts_of, train, seed=seed, scale=scale),
        rows(headings[train:], facts_of, validation, seed=seed + 1, scale=scale),
    )


def write(directory: Path, train: int = ROWS, validation: int = VALIDATION_ROWS, scale: int = 1) -> Files:
    """Both files, written anew, each in one go: another benchmark may be reading them."""
    directory.mkdir(parents=True, exist_ok=True)
    files = Files(directory / f"train-{train}x{scale}.jsonl", directory / f"validation-{train}x{scale}.jsonl")
    for path, found in zip((files.train, files.validation), classification_rows(train, validation, scale=scale), strict=True):
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        new.replace(path)
    return files


# --- as tokens -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as every tool sees it."""

    ids: list[int]
    supervised: list[bool]
    """(t,) the assistant's words and the end of its turn; what follows that (a line break) is not asked for."""


def encode(path: Path, tokenizer: Any, template: str) -> list[Encoded]:
    """The rows of ``path``; ``template`` marks the assistant's words with generation tags, as TRL wants it."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = tokenizer.apply_chat_template(
            json.loads(line)["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        found.append(Encoded(list(row["input_ids"]), [bool(flag) for flag in row["assistant_masks"]]))
    return found


def totals(encoded: Sequence[Encoded]) -> dict[str, int]:
    """Rows, tokens and supervised tokens; the first token of a row is never predicted."""
    sizes = sorted(len(row.ids) for row in encoded)
    return {
        "rows": len(sizes),
        "tokens": sum(sizes),
        "supervised_tokens": sum(sum(row.supervised[1:]) for row in encoded),
        "squared_tokens": sum(size * size for size in sizes),
        "shortest": sizes[0],
        "median": sizes[len(sizes) // 2],
        "longest": sizes[-1],
    }


TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own template, with the assistant's words marked; a test holds the two together."""
