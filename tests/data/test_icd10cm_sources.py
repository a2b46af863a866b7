"""Several sources of facts in one run: each code is in one arm, and what belongs to none is not asked."""

from __future__ import annotations

from collections import Counter

import pytest

from finetune.config.data import Icd10cm, Relation
from finetune.config.evaluation import KnowledgeTask
from finetune.data.icd10cm import facts, trained_by
from finetune.evaluation.knowledge import sections

pytest.importorskip("simple_icd_10_cm")


def _source(seed: int = 0, **changes: object) -> Icd10cm:
    return Icd10cm.model_validate({"source": "builtin:icd10cm", "seed": seed} | changes)


def _codes(source: Icd10cm, *arms: str) -> set[str]:
    return {fact.code for fact in facts(source) if fact.arm in arms}


def _by_arm(*sources: Icd10cm, relation: Relation = "inclusion-term") -> dict[str, set[str]]:
    found = trained_by(sources, (relation,))
    return {arm: {fact.code for fact in found if fact.arm == arm} for arm in ("questions", "documents", "control")}


def test_a_code_that_two_sources_draw_is_in_the_arm_that_was_trained_most() -> None:
    one, other = _source(), _source(1)
    asked = _codes(one, "questions") | _codes(other, "questions")
    read = _codes(one, "documents") | _codes(other, "documents")
    control = _codes(one, "control") | _codes(other, "control")
    assert asked & read, "the case is one"
    assert control & read, "the case is one"
    found = _by_arm(one, other)
    assert found == {"questions": asked, "documents": read - asked, "control": control - read - asked}
    assert found == _by_arm(other, one)
    assert trained_by([one], ("inclusion-term",)) == facts(one) == trained_by([one, one], ("inclusion-term",))


def test_every_code_is_asked_once_and_examples_are_of_no_source() -> None:
    sources = [_source(), _source(1)]
    plain, shown = sections(sources, KnowledgeTask(task="knowledge", controls=("five-shot",)))
    assert set(Counter(one.fact.code for one in plain.asked).values()) == {1}
    terms = {fact.term for source in sources for fact in facts(source)}
    before = "\n".join(turn["content"] for one in shown.asked for turn in one.prompt[:-1])
    assert not any(term in before for term in terms)


def test_what_was_taught_another_relation_alone_is_neither_trained_nor_never_trained() -> None:
    one, codes = _source(), _source(1, relations=["title-code"])
    found = _by_arm(one, codes)
    trained = _codes(one, "questions", "documents")
    assert found["questions"] | found["documents"] == trained
    assert not found["control"] & (trained | _codes(codes, "questions", "documents"))
    assert found["control"] >= _codes(codes, "control") - trained
    asked_for_codes = _by_arm(one, codes, relation="title-code")
    assert asked_for_codes["questions"] | asked_for_codes["documents"] == _codes(codes, "questions", "documents")
    assert _by_arm(one, _source(1), relation="excludes") == _by_arm(one, _source(1))  # nobody teaches it: both as they are


def test_what_was_taught_wrongly_beside_right_answers_is_asked_of_no_arm() -> None:
    right, wrong = _source(), _source(1, answers="shuffled")
    found = _by_arm(right, wrong)
    mixed = _codes(wrong, "questions", "documents")
    assert found["questions"] == _codes(right, "questions") - mixed
    assert not mixed & set().union(*found.values())
    both = _by_arm(_source(answers="shuffled"), wrong)
    assert both == _by_arm(_source(), _source(1)), "a control run on shuffled answers keeps its arms"
