"""What the model learns from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from finetune.config.section import Count, Section

Format = Literal["auto", "chat", "sharegpt", "prompt-completion", "question-answer", "alpaca", "text"]
Weight = Annotated[float, Field(gt=0.0, le=1000.0)]


class FileSource(Section):
    """Rows from a file or a directory."""

    source: Annotated[str, Field(min_length=1)]
    """A .jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt or .md file, the text formats also as .gz or .zst, or a directory or glob of
    them. Relative paths start at the config's directory."""
    format: Format = "auto"
    """How a row becomes a conversation. `auto` recognizes it by its columns."""
    columns: dict[str, Annotated[str, Field(min_length=1)]] = {}
    """The file's names for the format's columns, such as `{question: Frage, answer: Antwort}`."""
    weight: Weight = 1.0
    """How often the source is seen in an epoch: 2 is twice, 0.5 a seeded half. No source runs out: an epoch is the sum of all."""


class HubSource(Section):
    """A dataset of the Hugging Face hub, downloaded or from its cache; never with its own code."""

    source: Annotated[str, Field(pattern=r"^hub:[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")]
    """`hub:owner/name`."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """The commit of the dataset, 40 hexadecimal digits: what is trained on may not change."""
    subset: Annotated[str, Field(min_length=1)] | None = None
    """Configuration of the dataset, where it has several."""
    split: Annotated[str, Field(min_length=1)] = "train"
    """Split of the dataset, or a part of it, such as `train[:1000]`."""
    format: Format = "auto"
    """How a row becomes a conversation. `auto` recognizes it by its columns."""
    columns: dict[str, Annotated[str, Field(min_length=1)]] = {}
    """The dataset's names for the format's columns."""
    weight: Weight = 1.0
    """How often the source is seen in an epoch."""


Relation = Literal["inclusion-term", "code-title", "title-code", "hierarchy", "excludes"]


class Icd10cm(Section):
    """Real medical knowledge: ICD-10-CM facts (inclusion term -> title) as documents and questions in many phrasings."""

    source: Literal["builtin:icd10cm"]
    document_facts: Annotated[int, Field(ge=0, le=400)] = 40
    """Facts that are trained as declarative documents only (arm D of the benchmark)."""
    question_facts: Annotated[int, Field(ge=0, le=400)] = 40
    """Facts that are trained as documents and as questions of one style (arm D+Q)."""
    control_facts: Annotated[int, Field(ge=1, le=400)] = 40
    """Facts that are never trained (arm H): what they gain is style, not knowledge."""
    chapters: tuple[Annotated[str, Field(pattern=r"^[A-Z]$")], ...] = ()
    """First letters of the codes to draw from. Empty: A to N without C."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Which facts are drawn, and to which arm each goes."""
    relations: Annotated[tuple[Relation, ...], Field(min_length=1)] = ("inclusion-term",)
    """What is taught of each fact: its title by another name, title and code, the group it belongs to, what it excludes."""
    answers: Literal["right", "shuffled"] = "right"
    """`shuffled` gives every fact the title of another: a control run that can learn the style and nothing true."""
    replay: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Share of general text (Python's documentation, by characters) beside the facts, against forgetting."""
    weight: Weight = 1.0
    """How often the source is seen in an epoch."""


def _source_kind(value: object) -> str:
    source = value.get("source") if isinstance(value, dict) else getattr(value, "source", None)
    if source == "builtin:icd10cm":
        return "icd10cm"
    return "hub" if isinstance(source, str) and source.startswith("hub:") else "file"


Source = Annotated[
    Annotated[Icd10cm, Tag("icd10cm")] | Annotated[HubSource, Tag("hub")] | Annotated[FileSource, Tag("file")],
    Discriminator(_source_kind),
]


class ValidationSplit(Section):
    """Validation rows taken from the training sources by content hash, so that equal rows land on one side."""

    fraction: Annotated[float, Field(gt=0.0, lt=0.5)]
    """Share of the training rows."""


def _validation_kind(value: object) -> str:
    return "sources" if isinstance(value, (list, tuple)) else "split"


class Data(Section):
    """What the model learns from."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources of training rows."""
    validation: (
        Annotated[
            Annotated[ValidationSplit, Tag("split")] | Annotated[tuple[Source, ...], Field(min_length=1), Tag("sources")],
            Discriminator(_validation_kind),
        ]
        | None
    ) = None
    """`{fraction: 0.02}` of the training rows, a list of sources, or null for none."""
    max_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = 2048
    """Longest example, in tokens. Plain text is always cut into blocks of this length, each document apart."""
    supervise: Literal["assistant", "last-turn", "all"] = "assistant"
    """Which tokens carry loss: every assistant turn, the last one, or every token. A message with `weight: 0` never does."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to a conversation longer than `max_tokens`. `split` cuts it before a user's turn and repeats the system message."""
    duplicates: Literal["keep", "drop", "error"] = "keep"
    """What happens to training rows that are equal token by token. They are counted in any case."""
    near_duplicates: Literal["ignore", "count", "drop"] = "count"
    """What happens to training rows that share most of their word sequences (MinHash, Jaccard similarity about 0.8 and above)."""
    processes: Count | Literal["auto"] = "auto"
    """Processes that prepare rows; the result does not depend on it. `auto`: one for small data, else one a core."""
