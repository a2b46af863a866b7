"""`builtin:icd10cm`: real medical facts, drawn into arms. `icd10cm_rows` writes them as training rows, `icd10cm_questions` asks them.

The main relation is inclusion term -> title of the official classification ("Rendu-Osler-Weber disease" -> "Hereditary hemorrhagic
telangiectasia"), kept only where the wording of one gives nothing away about the other. Facts are split by code into three arms:

    documents   (D)    trained as declarative sentences only
    questions   (D+Q)  trained as declarative sentences and as questions of one style
    control     (H)    never trained: what these gain is style, not knowledge

Everything follows from the settings alone, never from Python's hash seed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.config.data import Icd10cm, Relation
from finetune.data.icd10cm_codes import DEFAULT_CHAPTERS, candidates, order
from finetune.errors import DataError

Arm = Literal["documents", "questions", "control"]

ARMS: tuple[Arm, ...] = ("documents", "questions", "control")
RIVALS = 3
"""Wrong answers from the same arm that a question offers."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One inclusion term and the title it is filed under."""

    code: str
    term: str
    title: str
    arm: Arm


def facts(settings: Icd10cm) -> tuple[Fact, ...]:
    """The facts that ``settings`` draws, ordered by code; chapters are spread evenly over the arms.

    Raises DataError if simple-icd-10-cm is not installed or the chapters hold fewer facts than are asked for.
    """
    chapters = "".join(settings.chapters) or DEFAULT_CHAPTERS
    pool = {code: pair for code, pair in candidates().items() if code[0] in chapters}
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


_PLACES = ("control", "other relations", "documents", "questions", "shuffled")
"""What a fact is to several sources: of all that they say of it, the last."""


def trained_by(sources: Sequence[Icd10cm], relations: Iterable[Relation]) -> tuple[Fact, ...]:
    """One fact a code over all ``sources``, ordered by code, in the arm that says how ``relations`` were trained on the whole.

    Trained counts before control, and questions before documents alone. Two kinds of facts belong to no arm and are left out: those of
    which other relations alone were trained (familiar, but not taught this), and those that were taught wrongly beside others that were
    taught rightly. Where no source teaches the relations, or all that do have shuffled answers, these sources are taken as they are.
    """
    teachers = [source for source in sources if set(relations) & set(source.relations)] or list(sources)
    right = [source for source in teachers if source.answers == "right"] or teachers
    places: dict[str, str] = {}
    for source in sources:
        for fact in facts(source):
            counts = fact.arm == "control" or source in right
            place = fact.arm if counts else "shuffled" if source.answers == "shuffled" else "other relations"
            places[fact.code] = max(places.get(fact.code, "control"), place, key=_PLACES.index)
    pool = candidates()
    return tuple(Fact(code, *pool[code], arm=arm) for code, place in sorted(places.items()) for arm in ARMS if arm == place)


def peers(fact: Fact, drawn: Iterable[Fact]) -> list[Fact]:
    """The other facts of its arm among ``drawn``, those of its chapter first: the answers to the first ones are its rivals."""
    found = [other for other in drawn if other.arm == fact.arm and other.code != fact.code]
    return sorted(found, key=lambda other: (other.code[0] != fact.code[0], order(fact.code, other.code)))


def spare(sources: Sequence[Icd10cm], count: int) -> tuple[tuple[str, str], ...]:
    """``count`` pairs of term and title that no arm of ``sources`` (at least one) has, to show the form of an answer with.

    DataError where there are too few.
    """
    drawn = {fact.code for source in sources for fact in facts(source)}
    rest = sorted((code for code in candidates() if code not in drawn), key=lambda code: order(f"{sources[0].seed}/spare", code))
    if len(rest) < count:
        raise DataError(
            f"the arms leave {len(rest)} facts over, and examples before a question need {count}",
            where="builtin:icd10cm",
            fix="lower document_facts, question_facts or control_facts, or leave `five-shot` out of the task's controls",
        )
    return tuple(candidates()[code] for code in rest[:count])


def _draw(codes: Iterable[str], count: int, seed: int) -> list[str]:
    """``count`` codes in which every chapter has its share, grouped by chapter and shuffled inside it."""
    chapters: defaultdict[str, list[str]] = defaultdict(list)
    for code in codes:
        chapters[code[0]].append(code)
    ranked: list[tuple[float, str, str]] = []
    for members in chapters.values():
        shuffled = sorted(members, key=lambda code: order(seed, code))
        # Rank over size: any prefix of the whole ranking then holds every chapter in proportion.
        ranked.extend(((rank + 0.5) / len(shuffled), order(seed, code), code) for rank, code in enumerate(shuffled))
    drawn = [code for _, _, code in sorted(ranked)[:count]]
    return sorted(drawn, key=lambda code: (code[0], order(seed, code)))


def _deal(wanted: dict[Arm, int]) -> Iterator[Arm]:
    """Every arm as often as wanted, as evenly mixed as possible: chapter by chapter, the arms keep their proportions."""
    total = sum(wanted.values())
    given: Counter[Arm] = Counter()
    for position in range(1, total + 1):
        arm = max(wanted, key=lambda name: wanted[name] * position / total - given[name])
        given[arm] += 1
        yield arm
