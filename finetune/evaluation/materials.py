"""What tasks take from the runs among the targets: validation rows, and the facts that are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.config.schema import Config, Icd10cm, KnowledgeTask
from finetune.data.render import Example, Renderer
from finetune.data.stored import load_rows
from finetune.errors import VerificationError
from finetune.evaluation import knowledge
from finetune.evaluation.request import Request
from finetune.evaluation.targets import Target, column_names
from finetune.model.load import load_tokenizer
from finetune.runs import open_run
from finetune.sealed import read_json, sha256_of

_NO_MATTER = {"replay", "weight"}
"""Settings of facts that do not say which are drawn, nor to which arm each goes."""


@dataclass(frozen=True, slots=True)
class Materials:
    """What tasks take from the runs among the targets."""

    validation: Sequence[Example] = ()
    tokenizer: str = ""
    """Hash of the tokenizer that the validation rows are tokens of."""
    facts: tuple[Icd10cm, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)


def materials_of(request: Request) -> Materials:
    """Validation rows of the first run that has some, facts of the first that was trained on some."""
    facts: tuple[Icd10cm, ...] = ()
    found = Materials()
    for target in request.targets:
        if target.kind != "run":
            continue
        facts = facts or _facts(request.configs[target.word])
        if not found.validation:
            found = _validation(target)
    return Materials(found.validation, found.tokenizer, facts, found.record)


def _validation(target: Target) -> Materials:
    run = open_run(target.path)
    directory = run.require_finished()
    digest = sha256_of(run.rows) if run.rows.is_file() else ""
    if digest != read_json(run.environment)["rows_sha256"]:
        raise VerificationError("the run's validation rows are not those it was validated on", where=str(run.rows), fix="restore the file")
    rows, is_validation = load_rows(run.rows)
    if not is_validation:
        return Materials()
    record = {"run": str(target.path.resolve()), "rows": len(rows), "sha256": digest}
    return Materials(rows, Renderer(load_tokenizer(directory)).tokenizer_hash, (), record)


def _facts(config: Config) -> tuple[Icd10cm, ...]:
    return tuple(source for source in config.data.train if isinstance(source, Icd10cm))


def trained_on_others(request: Request, task: KnowledgeTask) -> tuple[set[str], list[str]]:
    """Columns of runs of whose training the arms of ``task`` say nothing, because the facts are another run's; and notes on what is not
    its own, or not known to be."""
    columns = column_names(request.targets)
    first = next(target for target in request.targets if target.kind == "run" and _facts(request.configs[target.word]))
    asked = _facts(request.configs[first.word])
    others, notes = set(), []
    for target in request.targets:
        column = columns[target.word]
        if target.kind == "run" and not _is_same(asked, _facts(request.configs[target.word]), task):
            others.add(column)
            notes.append(
                f"{column}: it was not trained on the facts that are asked, those of {columns[first.word]}, or these are in other arms of "
                "it: what is called trained and never trained is not so of it, and nothing is concluded"
            )
        elif target.kind == "adapter":
            notes.append(f"{column}: what it was trained on is not known; it is judged by the facts of {columns[first.word]}")
    return others, notes


def _is_same(one: Sequence[Icd10cm], other: Sequence[Icd10cm], task: KnowledgeTask) -> bool:
    stated = [[source.model_dump(exclude=_NO_MATTER) for source in sources] for sources in (one, other)]
    return bool(other) and (stated[0] == stated[1] or knowledge.is_same(one, other, task))
