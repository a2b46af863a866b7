"""The ICD-10-CM classification: which of its facts are worth teaching, and what lies near a code.

Facts come from the official classification carried by simple-icd-10-cm, whose index must not be called in loops.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from typing import Any

from finetune.errors import DataError

DEFAULT_CHAPTERS = "ABDEFGHIJKLMN"

# A residual title ("Other ...", "... unspecified") names no condition, so it can be neither learned nor recognized.
_RESIDUAL = re.compile(r"\b(NOS|NEC|other|unspecified|elsewhere|otherwise)\b", re.IGNORECASE)
_CODE_REFERENCE = re.compile(r"\s*\((?=[A-Z]\d)[^)]*\)")


def order(seed: object, item: str) -> str:
    """A key by which items are shuffled alike on every machine."""
    return sha256(f"{seed}/{item}".encode()).hexdigest()


@cache
def classification() -> Any:
    """The package simple-icd-10-cm; DataError where it is not installed."""
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
def candidates() -> dict[str, tuple[str, str]]:
    """Code -> (term, title) of every fact worth teaching: 493 in the release of April 2026."""
    icd = classification()
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


# --- what is said of a code; empty where nothing is ----------------------------------------------------------------------------------


def code_itself(code: str) -> str:
    """The code."""
    return code


def title_of(code: str) -> str:
    """The official title."""
    return str(classification().get_description(code))


def term_of(code: str) -> str:
    """The first inclusion term that names a condition."""
    return next((term.strip() for term in classification().get_inclusion_term(code) if not _RESIDUAL.search(term)), "")


def group_of(code: str) -> str:
    """The title that the code is filed under."""
    return title_of(classification().get_parent(code))


def excluded_from(code: str) -> str:
    """The first condition that the code or its nearest ancestor excludes, without the codes it refers to."""
    icd = classification()
    for holder in (code, *icd.get_ancestors(code)):
        for note in (*icd.get_excludes1(holder), *icd.get_excludes2(holder)):
            return _CODE_REFERENCE.sub("", note).strip()
    return ""


def is_condition(code: str) -> bool:
    """Whether the code can be told from others by its title."""
    icd = classification()
    return bool(icd.is_leaf(code)) and not icd.is_extended_subcategory(code) and not _RESIDUAL.search(title_of(code))


def nearest(code: str, said: Callable[[str], str]) -> list[str]:
    """Three things ``said`` of conditions as near to ``code`` as the classification has them, but not of itself: same parent, else
    category, block, chapter, and then the candidates of every chapter. DataError where there are not three."""
    icd = classification()
    found: list[str] = []
    near = ([other for other in icd.get_descendants(ancestor) if is_condition(other)] for ancestor in icd.get_ancestors(code))
    for others in itertools.chain(near, [[*candidates()]]):
        values = {said(other) for other in others} - {"", said(code), *found}
        found += sorted(values, key=lambda value: order(code, value))[: 3 - len(found)]
        if len(found) == 3:
            return found
    raise DataError(f"no three neighbours of {code}", where="builtin:icd10cm", fix="leave its chapter out of data.train.chapters")
