"""What `finetune eval` measures: a union keyed by `task`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from finetune.config.data import FileSource, HubSource
from finetune.config.section import Count, Section


def _source_kind(value: object) -> str:
    source = value.get("source") if isinstance(value, dict) else getattr(value, "source", None)
    return "hub" if isinstance(source, str) and source.startswith("hub:") else "file"


Rows = Annotated[Annotated[HubSource, Tag("hub")] | Annotated[FileSource, Tag("file")], Discriminator(_source_kind)]
"""Rows that are only measured."""

Name = Annotated[str, Field(pattern=r"^[\w][\w .+-]{0,39}$")] | None
Style = Literal["chat", "text"]


class LossTask(Section):
    """Negative log-likelihood and perplexity over supervised tokens: of the run's validation rows, or of rows of its own."""

    task: Literal["loss"]
    name: Name = None
    """What its figures are called; tasks of one kind need different names. Null: `validation`, or `loss`."""
    data: Rows | None = None
    """Rows to measure, each token of a plain text. Null: the run's validation rows."""
    supervise: Literal["assistant", "last-turn", "all"] = "assistant"
    """Which tokens of a conversation in `data` count."""
    max_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = 2048
    """Longest row of `data`, in tokens. Plain text is cut into blocks of this length."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to a conversation of `data` that is longer."""


Metric = Literal["exact-match", "token-f1", "rouge-l", "chrf", "regex", "json"]


class GenerateTask(Section):
    """Free answers, compared with those of the rows. Generation stops at the end of the turn."""

    task: Literal["generate"]
    data: Rows
    """Rows with an answer: its prompt is all that stands before the last answer."""
    name: Name = None
    """What its figures are called; tasks of one kind need different names. Null: `generate`."""
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("exact-match", "token-f1")
    """`exact-match` and `token-f1` ignore case, punctuation and spacing; `rouge-l` and `chrf` need the extra `eval`; `regex` is the
    share of answers in which `pattern` is found, `json` that of answers which are JSON."""
    pattern: Annotated[str, Field(min_length=1)] | None = None
    """Python's regular expression for the metric `regex`."""
    style: Style = "chat"
    """`chat`: through the chat template. `text`: the prompt as it stands, for models without one."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts at which an answer ends besides the end of the turn, such as a line break; they are cut off."""
    max_new_tokens: Count = 128
    """Longest answer."""
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """0 is greedy: the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Where `temperature` is not 0: draw from the likeliest tokens that have this share together."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Of what is drawn."""


class ChoicesTask(Section):
    """Multiple choice by log-likelihood: rows with `question`, `choices` and `answer` (its text, its number from 0, or its letter)."""

    task: Literal["choices"]
    data: Rows
    """The rows; `columns` maps other names."""
    name: Name = None
    """What its figures are called; tasks of one kind need different names. Null: `choices`."""
    style: Style = "chat"
    """`chat`: the question as a user's turn, the choices as answers. `text`: the question, a space and the choice."""


Asked = Literal["knowledge", "memory", "reversed", "code", "group", "two-hops"]


class KnowledgeTask(Section):
    """Closed-book questions about the ICD-10-CM facts of `data.train`, in wordings never trained."""

    task: Literal["knowledge"]
    questions_per_fact: Annotated[int, Field(ge=1, le=3)] = 1
    """Wordings asked for each fact."""
    asks: Annotated[tuple[Asked, ...], Field(min_length=1)] = ("knowledge",)
    """`knowledge`: titles, in wordings never trained; `memory`: titles in trained words; `reversed`: the other name of a title; `code`,
    `group` and `two-hops` (a condition that the title of a name excludes): what `relations` of the source teaches besides."""
    controls: tuple[Literal["five-shot", "open-book"], ...] = ()
    """Ask the questions of `knowledge` again after five worked examples (form alone), or with the document in the prompt."""
    generate: bool = True
    """Also let the model answer freely and compare (exact match)."""


class ForgettingTask(Section):
    """What became of general English: loss on general text, and four-way choice on general questions."""

    task: Literal["forgetting"]


class HarnessTask(Section):
    """Tasks of lm-evaluation-harness (extra `eval`). Their data must be on this machine, in the hub's cache or in files."""

    task: Literal["harness"]
    tasks: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    """Names of its tasks, or paths of task files (`.yaml`)."""
    name: Name = None
    """What its figures are called; tasks of one kind need different names. Null: `harness`."""
    few_shot: Annotated[int, Field(ge=0, le=100)] | None = None
    """Worked examples before each question; null: as the task says."""
    limit: Count | None = None
    """Items of each task, from its start; null: all."""
    style: Style = "chat"
    """`chat`: through the chat template. `text`: as the task's own text."""


Task = Annotated[
    LossTask | GenerateTask | ChoicesTask | KnowledgeTask | ForgettingTask | HarnessTask,
    Field(discriminator="task"),
]


class Evaluation(Section):
    """What `finetune eval` measures, for the base and the tuned model side by side."""

    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] = (LossTask(task="loss"), ForgettingTask(task="forgetting"))
    """Measured in this order."""
    samples: Annotated[int, Field(ge=0, le=50)] = 3
    """Questions whose answers, before and after, are shown."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type that directories, hub ids and adapters without a run are measured in; `auto`: as stored. A run is measured as it was trained."""
    tokens_per_device: Annotated[int, Field(ge=16)] | Literal["auto"] = "auto"
    """Tokens (padding included) of a batch: memory, never the result. `auto`: as the run trained."""
