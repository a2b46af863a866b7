"""The ICD-10-CM facts: what is taught, what is asked, and that the two never meet."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from finetune.config.schema import Icd10cm
from finetune.data import icd10cm, icd10cm_codes
from finetune.data.general import general_text
from finetune.data.icd10cm import facts
from finetune.data.icd10cm_questions import KINDS, WORDINGS, Kind, controlled, digest, questions
from finetune.data.icd10cm_rows import (
    DOCUMENT_TEMPLATES,
    LINES_PER_PAGE,
    PAGE_PROMPT,
    QUESTION_TEMPLATES,
    RELATION_TEMPLATES,
    REPLAY_PROMPT,
    training_rows,
)
from finetune.errors import DataError

pytest.importorskip("simple_icd_10_cm")


def _settings(**changes: object) -> Icd10cm:
    defaults = {"document_facts": 24, "question_facts": 24, "control_facts": 32}
    return Icd10cm.model_validate({"source": "builtin:icd10cm"} | defaults | changes)


def _contents(row: dict[str, object]) -> list[str]:
    messages = row["messages"]
    assert isinstance(messages, list)
    return [message["content"] for message in messages]


ALL = _settings(document_facts=193, question_facts=150, control_facts=150)

# --- facts ---------------------------------------------------------------------------------------------------------------------------


def test_all_493_facts_can_be_drawn() -> None:
    found = facts(ALL)
    assert len(found) == 493
    assert len({fact.code for fact in found}) == len({fact.term for fact in found}) == len({fact.title for fact in found}) == 493


def test_no_title_can_be_guessed_from_the_words_of_its_term() -> None:
    for fact in facts(ALL):
        shared = set(re.findall(r"[a-z]{4,}", fact.term.lower())) & set(re.findall(r"[a-z]{4,}", fact.title.lower()))
        assert not shared, fact


def test_arms_have_the_sizes_asked_for_and_share_the_chapters() -> None:
    drawn = facts(_settings(document_facts=40, question_facts=40, control_facts=40))
    assert Counter(fact.arm for fact in drawn) == {"documents": 40, "questions": 40, "control": 40}
    by_chapter = {arm: Counter(fact.code[0] for fact in drawn if fact.arm == arm) for arm in icd10cm.ARMS}
    for chapter in {fact.code[0] for fact in drawn}:
        counts = [by_chapter[arm][chapter] for arm in icd10cm.ARMS]
        assert max(counts) - min(counts) <= 2, (chapter, counts)


def test_chapters_limit_the_draw() -> None:
    drawn = facts(_settings(chapters=["E", "K"]))
    assert {fact.code[0] for fact in drawn} == {"E", "K"}


def test_too_many_facts_are_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(DataError, match=r"80 facts are asked for, but chapters H hold \d+") as caught:
        facts(_settings(chapters=["H"]))
    assert caught.value.problems[0].fix


def test_the_split_is_the_same_on_every_machine() -> None:
    """The manifest of the quickstart's facts: a change here makes earlier results incomparable."""
    assert _digest() == "18c3558dd87c3f3cbc662c9dfb50959fe35e81df70e315ba55825a95a88fcf3c"


def test_the_split_does_not_follow_the_hash_seed() -> None:
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('t', {__file__!r}); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); print(m._digest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == _digest()


def _digest() -> str:
    settings = _settings()
    lines = [f"{fact.code}|{fact.term}|{fact.title}|{fact.arm}" for fact in facts(settings)]
    lines += [json.dumps(row) for row in training_rows(settings)]
    lines += [f"{question.prompt}|{question.choices}" for question in questions(settings, 3)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_another_seed_draws_other_facts() -> None:
    assert {fact.code for fact in facts(_settings())} != {fact.code for fact in facts(_settings(seed=1))}


# --- leakage (pitfall A15) -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relations", [("inclusion-term",), ("inclusion-term", *RELATION_TEMPLATES)])
def test_a15_no_control_fact_is_in_the_training_rows(relations: tuple[str, ...]) -> None:
    rows = [" ".join(_contents(row)) for row in training_rows(ALL.model_copy(update={"relations": relations}))]
    for fact in facts(ALL):
        if fact.arm == "control":
            assert not any(fact.title in row and fact.term in row for row in rows), fact
            assert not any(f"{fact.code} " in row for row in rows), fact


def test_a15_no_test_wording_is_in_the_training_rows() -> None:
    rows = training_rows(ALL.model_copy(update={"relations": ("inclusion-term", *RELATION_TEMPLATES)}))
    trained = {content for row in rows for content in _contents(row)}
    for question in questions(ALL, 3):
        assert question.prompt[-1]["content"] not in trained
    for wording in WORDINGS:
        for piece in wording.split("{term}"):
            words = piece.split()
            # No run of five words of a test wording stands in any trained template.
            for start in range(len(words) - 4):
                run = " ".join(words[start : start + 5])
                assert not any(run in template for template in (*DOCUMENT_TEMPLATES, PAGE_PROMPT, *QUESTION_TEMPLATES)), run


# --- rows ----------------------------------------------------------------------------------------------------------------------------


def test_each_trained_fact_is_written_once_in_every_template() -> None:
    settings = _settings()
    rows = training_rows(settings)
    assert len(rows) == 48 * len(DOCUMENT_TEMPLATES) / LINES_PER_PAGE + 24 * len(QUESTION_TEMPLATES)
    text = "\n".join(content for row in rows for content in _contents(row)) + "\n"
    for fact in facts(settings):
        for template in DOCUMENT_TEMPLATES:
            expected = 0 if fact.arm == "control" else 1
            assert text.count("\n" + template.format(term=fact.term, title=fact.title) + "\n") == expected, fact
        for template in QUESTION_TEMPLATES:
            asked = [row for row in rows if _contents(row) == [template.format(term=fact.term), fact.title]]
            assert len(asked) == (1 if fact.arm == "questions" else 0), fact


def test_a_page_mixes_facts_and_templates() -> None:
    pages = [_contents(row) for row in training_rows(_settings(question_facts=0))]
    assert {prompt for prompt, _ in pages} == {PAGE_PROMPT}
    titles = [fact.title for fact in facts(_settings(question_facts=0))]
    assert sum(len({title for title in titles if title in page}) >= 4 for _, page in pages) > 0.9 * len(pages)


def test_documents_name_the_title_last_and_first() -> None:
    orders = {template.index("{term}") < template.index("{title}") for template in DOCUMENT_TEMPLATES}
    assert len(DOCUMENT_TEMPLATES) == 5
    assert orders == {True, False}, "both orders are read"


def test_further_relations_describe_the_same_codes() -> None:
    relations = ["code-title", "title-code", "hierarchy", "excludes"]
    settings = _settings(document_facts=4, question_facts=4, control_facts=1, relations=relations)
    rows = training_rows(settings)
    text = "\n".join(content for row in rows for content in _contents(row))
    assert "{" not in text
    for fact in facts(settings):
        assert (fact.code in text) == (fact.arm != "control")


# --- questions -----------------------------------------------------------------------------------------------------------------------


def test_every_fact_is_asked_with_three_sibling_titles() -> None:
    asked = questions(ALL, 1)
    assert len(asked) == 493
    titles = {fact.title for fact in facts(ALL)}
    places = Counter(question.choices.index(question.answer) for question in asked)
    for question in asked:
        assert len(set(question.choices)) == 4
        assert question.answer == question.fact.title
        assert question.fact.term in question.prompt[-1]["content"]
    assert min(places.values()) > 80, "the answer's place gives nothing away"
    assert any(choice not in titles for question in asked for choice in question.choices)


def test_rivals_are_titles_of_other_facts_of_the_same_arm() -> None:
    settings = _settings()
    arms = {fact.title: fact.arm for fact in facts(settings)}
    for question in questions(settings):
        assert len(set(question.rivals)) == 3
        assert question.answer not in question.rivals
        assert {arms[title] for title in question.rivals} == {question.fact.arm}


def test_wordings_are_asked_in_turn() -> None:
    settings = _settings(document_facts=1, question_facts=1, control_facts=1)
    assert [question.wording for question in questions(settings, 3)] == [0, 1, 2] * 3
    assert [question.wording for question in questions(settings)] == [0] * 3


def test_without_the_package_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    icd10cm_codes.classification.cache_clear()
    icd10cm_codes.candidates.cache_clear()
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    try:
        with pytest.raises(DataError, match="simple-icd-10-cm") as caught:
            facts(_settings())
        assert "pip install" in caught.value.problems[0].fix
    finally:
        icd10cm_codes.classification.cache_clear()


# --- controls and further questions --------------------------------------------------------------------------------------------------


def test_shuffled_answers_are_all_wrong_and_otherwise_the_same_rows() -> None:
    right, wrong = (training_rows(_settings(answers=answers)) for answers in ("right", "shuffled"))
    assert [_contents(row)[0] for row in right] == [_contents(row)[0] for row in wrong]
    titles = {fact.term: fact.title for fact in facts(_settings())}
    asked = [row for row in wrong if _contents(row)[0] != PAGE_PROMPT]
    for row in asked:
        term = next(term for term in sorted(titles, key=len, reverse=True) if term in _contents(row)[0])
        assert _contents(row)[1] != titles[term]
        assert _contents(row)[1] in titles.values()
    pages = "\n".join(_contents(row)[1] for row in wrong)
    for fact in facts(_settings()):
        assert DOCUMENT_TEMPLATES[0].format(term=fact.term, title=fact.title) not in pages
    for line in range(len(DOCUMENT_TEMPLATES)):  # in every wording, each title as often as before, and in each arm
        for arm in ("documents", "questions"):
            said = [fact.title for fact in facts(_settings()) if fact.arm == arm]
            assert _said(wrong, line, said) == _said(right, line, said) > 0
    with pytest.raises(DataError, match="one fact cannot be shuffled"):
        training_rows(_settings(document_facts=1, question_facts=0, answers="shuffled"))


def _said(rows: list[dict[str, object]], line: int, titles: list[str]) -> int:
    """How many lines of one template name one of ``titles``."""
    before, after = DOCUMENT_TEMPLATES[line].split("{title}")
    found = "\n".join(_contents(row)[1] for row in rows if _contents(row)[0] == PAGE_PROMPT)
    return sum(found.count(f"{before.split('{term}')[-1]}{title}{after.split('{term}')[0]}") for title in titles)


@pytest.mark.parametrize(("facts_an_arm", "seed"), [(9, 0), (14, 0), (14, 1), (80, 0)])
def test_shuffled_answers_never_teach_a_rival(facts_an_arm: int, seed: int) -> None:
    settings = _settings(document_facts=facts_an_arm, question_facts=facts_an_arm, answers="shuffled", seed=seed)
    taught = {}
    for row in training_rows(settings):
        for line in _contents(row)[1].splitlines() if _contents(row)[0] == PAGE_PROMPT else ():
            for fact in facts(settings):
                start = f"In ICD-10-CM, {fact.term} is classified as "
                if line.startswith(start):
                    taught[fact.code] = line.removeprefix(start).removesuffix(".")
    assert len(taught) == 2 * facts_an_arm
    for question in questions(settings, 1, "knowledge"):
        if question.fact.arm != "control":
            assert taught[question.fact.code] not in (question.answer, *question.rivals)


def test_replay_is_the_share_of_characters_that_it_says() -> None:
    rows = training_rows(_settings(replay=0.25))
    lengths = [(_contents(row)[0] == REPLAY_PROMPT, len(_contents(row)[1])) for row in rows]
    replayed = sum(length for is_replay, length in lengths if is_replay)
    assert replayed / sum(length for _, length in lengths) == pytest.approx(0.25, abs=0.03)
    assert training_rows(_settings(replay=0.25)) == rows
    assert rows[: -sum(is_replay for is_replay, _ in lengths)] == training_rows(_settings())
    assert not any(_contents(row)[1] in general_text() for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_facts_that_a_file_names_by_default_can_be_asked_in_every_way(kind: Kind) -> None:
    asked = questions(Icd10cm(source="builtin:icd10cm"), 1, kind)
    assert len(asked) >= 100
    assert all(len({*question.choices}) == 4 for question in asked)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_question_has_near_and_rival_answers(kind: Kind) -> None:
    settings = _settings(document_facts=12, question_facts=12, control_facts=12)
    asked = questions(settings, 1, kind)
    assert len(asked) >= {"two-hops": 12, "group": 24}.get(kind, 36)
    for question in asked:
        assert len(set(question.choices)) == 4
        assert question.answer in question.choices
        assert question.answer not in question.rivals
        assert question.rivals
        assert "{" not in question.prompt[-1]["content"] + question.opening
        # what is asked for stands nowhere in the question
        assert question.answer not in question.prompt[-1]["content"] + question.opening


def test_reversed_questions_ask_for_the_term_and_codes_for_the_code() -> None:
    settings = _settings(document_facts=3, question_facts=3, control_facts=3)
    for kind, field in {"reversed": "term", "code": "code", "memory": "title", "knowledge": "title"}.items():
        assert [one.answer for one in questions(settings, 1, kind)] == [getattr(fact, field) for fact in facts(settings)]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "memory"])
def test_a15_no_wording_of_any_kind_is_trained(kind: Kind) -> None:
    relations = ("inclusion-term", *RELATION_TEMPLATES)
    trained = {content for row in training_rows(_settings(relations=relations)) for content in _contents(row)}
    assert not any(question.prompt[-1]["content"] in trained for question in questions(_settings(), 3, kind))


def test_memory_is_asked_in_words_that_were_trained() -> None:
    pages = "\n".join(_contents(row)[1] for row in training_rows(_settings())) + "\n"
    for question in questions(_settings(), 1, "memory"):
        assert (f"{question.opening}{question.answer}\n" in pages) == (question.fact.arm != "control")


def test_five_examples_are_of_no_arm() -> None:
    settings = _settings(document_facts=3, question_facts=3, control_facts=3)
    for question in controlled([settings], questions(settings), "five-shot"):
        *shown, last = question.prompt
        assert len(shown) == 10
        assert question.fact.term in last["content"]
        assert not any(fact.title in turn["content"] or fact.term in turn["content"] for turn in shown for fact in facts(settings))
    with pytest.raises(DataError, match="leave 0 facts over"):
        controlled([ALL], questions(ALL), "five-shot")


def test_an_open_book_holds_the_answer() -> None:
    settings = _settings(document_facts=3, question_facts=3, control_facts=3)
    for question in controlled([settings], questions(settings), "open-book"):
        assert question.fact.title in question.prompt[-1]["content"]


def test_equal_questions_have_equal_digests() -> None:
    assert digest(questions(_settings())) == digest(questions(_settings()))
    assert digest(questions(_settings())) != digest(questions(_settings(), 2))
