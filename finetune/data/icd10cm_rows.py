"""The ICD-10-CM facts as training rows: documents in five wordings, questions of one style, further relations, and two controls.

The controls are settings of the data: with shuffled answers a run can learn the style and nothing true, and replayed general text shows
what forgetting costs to prevent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from finetune.config.data import Icd10cm, Relation
from finetune.data.general import replay_passages
from finetune.data.icd10cm import ARMS, RIVALS, Fact, facts, peers
from finetune.data.icd10cm_codes import excluded_from, group_of, order
from finetune.errors import DataError

Row = dict[str, Any]

# Four name the term first and one the title, because a model learns a fact in the order in which it reads it, and the title is what is
# asked. The second puts the title where a line starts: an answer starts a line too and is then made of the same tokens.
DOCUMENT_TEMPLATES = (
    "In ICD-10-CM, {term} is classified as {title}.",
    "Inclusion term: {term}\nTitle:\n{title}",
    "{title} is the ICD-10-CM title that includes {term}.",
    "A record that mentions {term} is coded as {title}.",
    "{term} is listed under the heading {title}.",
)
LINES_PER_PAGE = 5
PAGE_PROMPT = "Quote a page of the ICD-10-CM index."
QUESTION_TEMPLATES = ("Which ICD-10-CM title covers {term}?", "Under which ICD-10-CM title is {term} found?")
RELATION_TEMPLATES: dict[Relation, tuple[tuple[str, str], ...]] = {
    "code-title": (
        ("What does the ICD-10-CM code {code} stand for?", "{title}"),
        ("Describe the diagnosis code {code}.", "{code} stands for {title}."),
    ),
    "title-code": (
        ("What is the ICD-10-CM code of {title}?", "{code}"),
        ("How is {title} coded?", "{title} has the ICD-10-CM code {code}."),
    ),
    "hierarchy": (
        ("To which group of ICD-10-CM does {title} belong?", "{parent}"),
        ("Where in ICD-10-CM is {title} found?", "{title} is found under {parent}."),
    ),
    "excludes": (
        ("Name a condition that ICD-10-CM excludes from {title}.", "{excluded}"),
        ("What is not coded as {title}?", "{excluded} is not coded as {title}."),
    ),
}
REPLAY_PROMPT = "Quote a passage of a manual."


def training_rows(settings: Icd10cm) -> list[Row]:
    """Conversations about the facts of the two trained arms, as rows ``{"messages": [...]}``.

    Documents are pages of five lines about different facts, quoted by the assistant on one neutral request. Trained as plain texts they
    taught about as much, but the loss on general text rose by 0.41 nats a token instead of 0.04 (SmolLM2-135M, learning rate 2e-4).
    """
    trained = [fact for fact in facts(settings) if fact.arm != "control"]
    if settings.answers == "shuffled":
        trained = _shuffled(trained, settings.seed)
    rows: list[Row] = []
    if "inclusion-term" in settings.relations:
        rows.extend(_pages(trained, settings.seed))
        asked = [fact for fact in trained if fact.arm == "questions"]
        rows.extend(_conversation(template.format(term=fact.term), fact.title) for fact in asked for template in QUESTION_TEMPLATES)
    for fact in trained:
        rows.extend(_relation_rows(fact, settings.relations))
    return rows + _replayed(rows, settings)


def _shuffled(trained: Sequence[Fact], seed: int) -> list[Fact]:
    """Every fact with the title of another of its arm, so that style can be learned and nothing true.

    Within an arm, each title is read as often as before. A title that a question will offer as a rival is not given to its fact where that
    can be avoided: it would be learned as the wrong answer, and substance would seem to be lost.
    """
    titles: dict[str, str] = {}
    for arm in ARMS:
        ring = sorted((fact for fact in trained if fact.arm == arm), key=lambda fact: order(f"{seed}/shuffled", fact.code))
        if len(ring) == 1:
            raise DataError(
                "answers of one fact cannot be shuffled", where="builtin:icd10cm", fix="have two document_facts and question_facts, or none"
            )
        by_code = {fact.code: fact.title for fact in ring}
        titles |= {code: by_code[other] for code, other in _exchanged(ring).items()}
    return [replace(fact, title=titles[fact.code]) for fact in trained]


def _exchanged(ring: Sequence[Fact]) -> dict[str, str]:
    """Code -> code of the fact whose title it gets: the next one's, but for exchanges of two that rid one of a rival."""
    codes = [fact.code for fact in ring]
    never = {fact.code: {fact.code, *(rival.code for rival in peers(fact, ring)[:RIVALS])} for fact in ring}
    given = dict(zip(codes, [*codes[1:], *codes[:1]], strict=True))
    for code in codes:
        if given[code] in never[code]:
            fits = (other for other in codes if given[other] not in never[code] and given[code] not in never[other])
            other = next(fits, code)
            given[code], given[other] = given[other], given[code]
    return given


def _pages(trained: Sequence[Fact], seed: int) -> Iterator[Row]:
    """Every fact once in every template, in as many rounds; neighbours on a page change from round to round."""
    lines: list[str] = []
    for turn in range(len(DOCUMENT_TEMPLATES)):
        for index in sorted(range(len(trained)), key=lambda index: order(f"{seed}/{turn}", trained[index].code)):
            template = DOCUMENT_TEMPLATES[(index + turn) % len(DOCUMENT_TEMPLATES)]
            lines.append(template.format(term=trained[index].term, title=trained[index].title))
    for start in range(0, len(lines), LINES_PER_PAGE):
        yield _conversation(PAGE_PROMPT, "\n".join(lines[start : start + LINES_PER_PAGE]))


def _conversation(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _relation_rows(fact: Fact, relations: Sequence[Relation]) -> Iterator[Row]:
    chosen = [relation for relation in relations if relation in RELATION_TEMPLATES]
    if not chosen:
        return
    values = {"code": fact.code, "title": fact.title, "parent": group_of(fact.code), "excluded": excluded_from(fact.code)}
    for relation in chosen:
        for question, answer in RELATION_TEMPLATES[relation]:
            if relation != "excludes" or values["excluded"]:
                yield _conversation(question.format(**values), answer.format(**values))


def _replayed(rows: Sequence[Row], settings: Icd10cm) -> list[Row]:
    """General passages that make up the share ``replay`` of all characters that carry loss."""
    wanted = settings.replay / (1 - settings.replay) * sum(len(row["messages"][-1]["content"]) for row in rows)
    found: list[Row] = []
    for passage in replay_passages(settings.seed) if wanted else ():
        if wanted <= 0:
            return found
        found.append(_conversation(REPLAY_PROMPT, passage))
        wanted -= len(passage)
    if wanted > 0:
        raise DataError(
            f"there is too little general text for a replay of {settings.replay:.0%}", where="builtin:icd10cm", fix="lower `replay`"
        )
    return found
