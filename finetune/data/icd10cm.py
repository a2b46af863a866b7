"""`builtin:icd10cm`: real medical facts, drawn into arms, written as training rows and asked as closed-book questions.

The main relation is inclusion term -> title of the official classification ("Rendu-Osler-Weber disease" -> "Hereditary hemorrhagic
telangiectasia"), kept only where the wording of one gives nothing away about the other. Facts are split by code into three arms:

    documents   (D)    trained as declarative sentences only
    questions   (D+Q)  trained as declarative sentences and as questions of one style
    control     (H)    never trained: what these gain is style, not knowledge

The test questions are worded as no training row is. Everything follows from the settings alone, never from Python's hash seed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any, Literal

from finetune.config.schema import Icd10cm
from finetune.errors import DataError

Arm = Literal["documents", "questions", "control"]
Relation = Literal["inclusion-term", "code-title", "title-code", "hierarchy", "excludes"]
Message = dict[str, str]
Row = dict[str, Any]

ARMS: tuple[Arm, ...] = ("documents", "questions", "control")
DEFAULT_CHAPTERS = "ABDEFGHIJKLMN"

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
WORDINGS = (
    'You are a medical coder. The diagnosis in the chart reads "{term}". Reply with the official ICD-10-CM name of this condition only.',
    "What is the official name of the condition that doctors also call {term}?",
    "Translate this diagnosis into the wording of the classification: {term}",
)
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

# A residual title ("Other ...", "... unspecified") names no condition, so it can be neither learned nor recognized.
_RESIDUAL = re.compile(r"\b(NOS|NEC|other|unspecified|elsewhere|otherwise)\b", re.IGNORECASE)
_CODE_REFERENCE = re.compile(r"\s*\((?=[A-Z]\d)[^)]*\)")


@dataclass(frozen=True, slots=True)
class Fact:
    """One inclusion term and the title it is filed under."""

    code: str
    term: str
    title: str
    arm: Arm


@dataclass(frozen=True, slots=True)
class Question:
    """A fact asked in a wording that no training row has."""

    fact: Fact
    wording: int
    """Index into `WORDINGS`."""
    prompt: tuple[Message, ...]
    """The conversation up to the answer, for the chat template."""
    answer: str
    choices: tuple[str, str, str, str]
    """The answer and three titles of its nearest siblings, in an order that follows from the code and the wording."""
    rivals: tuple[str, ...]
    """Titles of up to three other facts of the same arm, of the same chapter first. Titles that were trained are familiar, whichever term
    they belong to; only a model that has bound term and title prefers the answer to these."""


def facts(settings: Icd10cm) -> tuple[Fact, ...]:
    """The facts that ``settings`` draws, ordered by code; chapters are spread evenly over the arms.

    Raises DataError if simple-icd-10-cm is not installed or the chapters hold fewer facts than are asked for.
    """
    chapters = "".join(settings.chapters) or DEFAULT_CHAPTERS
    pool = {code: pair for code, pair in _candidates().items() if code[0] in chapters}
    wanted: dict[Arm, int] = dict(zip(ARMS, (settings.document_facts, settings.question_facts, settings.control_facts), strict=True))
    total = sum(wanted.values())
    if total > len(pool):
        raise DataError(
            f"{total} facts are asked for, but chapters {', '.join(chapters)} hold {len(pool)}",
            where="builtin:icd10cm",
            fix="lower document_facts, question_facts or control_facts, or name more chapters",
        )
    drawn = _draw(sorted(pool), total, settings.seed)
    arms = dict(zip(drawn, _deal(wanted), strict=True))
    return tuple(Fact(code, *pool[code], arm=arms[code]) for code in sorted(drawn))


def training_rows(settings: Icd10cm, relations: Sequence[Relation] = ("inclusion-term",)) -> list[Row]:
    """Conversations about the facts of the two trained arms, as rows ``{"messages": [...]}``.

    Documents are pages of five lines about different facts, quoted by the assistant on one neutral request. Trained as plain texts they
    taught about as much, but the loss on general text rose by 0.41 nats a token instead of 0.04 (SmolLM2-135M, learning rate 2e-4).

    ``relations`` beyond the first describe the same codes further (code, group, excluded conditions); no benchmark asks for them.
    """
    trained = [fact for fact in facts(settings) if fact.arm != "control"]
    rows: list[Row] = []
    if "inclusion-term" in relations:
        rows.extend(_pages(trained, settings.seed))
        asked = [fact for fact in trained if fact.arm == "questions"]
        rows.extend(_conversation(template.format(term=fact.term), fact.title) for fact in asked for template in QUESTION_TEMPLATES)
    for fact in trained:
        rows.extend(_relation_rows(fact, relations))
    return rows


def questions(settings: Icd10cm, wordings: int = 1) -> tuple[Question, ...]:
    """The first ``wordings`` (1 to 3) test questions about every fact of every arm, ordered by code."""
    drawn = facts(settings)
    return tuple(_question(fact, wording, drawn) for fact in drawn for wording in range(min(wordings, len(WORDINGS))))


def _question(fact: Fact, wording: int, drawn: Sequence[Fact]) -> Question:
    choices = sorted((fact.title, *_siblings(fact.code, fact.title)), key=lambda title: _order(f"{fact.code}/{wording}", title))
    peers = [other for other in drawn if other.arm == fact.arm and other.code != fact.code]
    peers.sort(key=lambda other: (other.code[0] != fact.code[0], _order(fact.code, other.code)))
    return Question(
        fact=fact,
        wording=wording,
        prompt=({"role": "user", "content": WORDINGS[wording].format(term=fact.term)},),
        answer=fact.title,
        choices=(choices[0], choices[1], choices[2], choices[3]),
        rivals=tuple(peer.title for peer in peers[:3]),
    )


# --- drawing -------------------------------------------------------------------------------------------------------------------------


def _order(seed: object, item: str) -> str:
    return sha256(f"{seed}/{item}".encode()).hexdigest()


def _draw(codes: Iterable[str], count: int, seed: int) -> list[str]:
    """``count`` codes in which every chapter has its share, grouped by chapter and shuffled inside it."""
    chapters: defaultdict[str, list[str]] = defaultdict(list)
    for code in codes:
        chapters[code[0]].append(code)
    ranked: list[tuple[float, str, str]] = []
    for members in chapters.values():
        shuffled = sorted(members, key=lambda code: _order(seed, code))
        # Rank over size: any prefix of the whole ranking then holds every chapter in proportion.
        ranked.extend(((rank + 0.5) / len(shuffled), _order(seed, code), code) for rank, code in enumerate(shuffled))
    drawn = [code for _, _, code in sorted(ranked)[:count]]
    return sorted(drawn, key=lambda code: (code[0], _order(seed, code)))


def _deal(wanted: dict[Arm, int]) -> Iterator[Arm]:
    """Every arm as often as wanted, as evenly mixed as possible: chapter by chapter, the arms keep their proportions."""
    total = sum(wanted.values())
    given: Counter[Arm] = Counter()
    for position in range(1, total + 1):
        arm = max(wanted, key=lambda name: wanted[name] * position / total - given[name])
        given[arm] += 1
        yield arm


# --- the classification --------------------------------------------------------------------------------------------------------------


@cache
def _classification() -> Any:
    try:
        import simple_icd_10_cm
    except ModuleNotFoundError as error:
        raise DataError(
            "builtin:icd10cm needs the package simple-icd-10-cm",
            where="data.train",
            fix="pip install 'finetune[quickstart]'",
        ) from error
    return simple_icd_10_cm


@cache
def _candidates() -> dict[str, tuple[str, str]]:
    """Code -> (term, title) of every fact worth teaching: 493 in the release of April 2026."""
    icd = _classification()
    terms = {code: icd.get_inclusion_term(code) for code in icd.get_all_codes()}
    uses = Counter(term.strip().lower() for members in terms.values() for term in members)
    found = {}
    for code, members in terms.items():
        if not members or code[0] not in DEFAULT_CHAPTERS or not icd.is_leaf(code):
            continue
        title = icd.get_description(code)
        kept = [term for term in members if uses[term.strip().lower()] == 1 and _teachable(term, title)]
        if kept:
            found[code] = (kept[0].strip(), title)
    return found


def _teachable(term: str, title: str) -> bool:
    """Whether both name a condition, and no word of four letters or more of one occurs in the other."""
    if _RESIDUAL.search(term) or _RESIDUAL.search(title):
        return False
    a, b = term.lower(), title.lower()
    return not any(word in b for word in _words(a)) and not any(word in a for word in _words(b))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]{4,}", text)


def _siblings(code: str, title: str) -> list[str]:
    """Three titles as near to ``code`` as the classification has them: same parent, else category, block, chapter."""
    icd = _classification()
    found: list[str] = []
    for ancestor in icd.get_ancestors(code):
        titles = {_title(other) for other in icd.get_descendants(ancestor) if _is_condition(other)} - {title, *found}
        found += sorted(titles, key=lambda other: _order(code, other))[: 3 - len(found)]
        if len(found) == 3:
            return found
    raise DataError(f"no three titles beside {code}", where="builtin:icd10cm", fix="leave its chapter out of data.train.chapters")


def _title(code: str) -> str:
    return str(_classification().get_description(code))


def _is_condition(code: str) -> bool:
    icd = _classification()
    return bool(icd.is_leaf(code)) and not icd.is_extended_subcategory(code) and not _RESIDUAL.search(_title(code))


# --- rows ----------------------------------------------------------------------------------------------------------------------------


def _pages(trained: Sequence[Fact], seed: int) -> Iterator[Row]:
    """Every fact once in every template, in as many rounds; neighbours on a page change from round to round."""
    lines: list[str] = []
    for turn in range(len(DOCUMENT_TEMPLATES)):
        for index in sorted(range(len(trained)), key=lambda index: _order(f"{seed}/{turn}", trained[index].code)):
            template = DOCUMENT_TEMPLATES[(index + turn) % len(DOCUMENT_TEMPLATES)]
            lines.append(template.format(term=trained[index].term, title=trained[index].title))
    for start in range(0, len(lines), LINES_PER_PAGE):
        yield _conversation(PAGE_PROMPT, "\n".join(lines[start : start + LINES_PER_PAGE]))


def _conversation(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _relation_rows(fact: Fact, relations: Sequence[Relation]) -> Iterator[Row]:
    icd = _classification()
    values = {"code": fact.code, "title": fact.title, "parent": _title(icd.get_parent(fact.code)), "excluded": _excluded(fact.code)}
    for relation in relations:
        for question, answer in RELATION_TEMPLATES.get(relation, ()):
            if relation != "excludes" or values["excluded"]:
                yield _conversation(question.format(**values), answer.format(**values))


def _excluded(code: str) -> str:
    """The first condition that ``code`` or its nearest ancestor excludes, without the codes it refers to; empty if there is none."""
    icd = _classification()
    for holder in (code, *icd.get_ancestors(code)):
        for note in (*icd.get_excludes1(holder), *icd.get_excludes2(holder)):
            return _CODE_REFERENCE.sub("", note).strip()
    return ""
