"""The general text and questions that measure forgetting."""

from __future__ import annotations

import hashlib

import pytest

from finetune.data.general import general_questions, general_text
from finetune.data.icd10cm_rows import DOCUMENT_TEMPLATES, QUESTION_TEMPLATES
from finetune.model.builtin import BUILTIN, resolve_model


def test_the_text_is_the_one_that_earlier_figures_refer_to() -> None:
    text = general_text()
    assert hashlib.sha256(text.encode()).hexdigest() == "645fd07dca1d438591828442ae6568040c36601fe6b1c82708465fc991eed96c"
    assert text.isascii()
    assert "\n\n" in text


def test_questions_have_four_different_answers() -> None:
    asked = general_questions()
    assert len(asked) >= 24
    assert len({one.question for one in asked}) == len(asked)
    for one in asked:
        assert len({one.answer, *one.distractors}) == 4, one.question
        assert one.question.endswith("?")


def test_nothing_general_is_trained() -> None:
    trained = " ".join((*DOCUMENT_TEMPLATES, *QUESTION_TEMPLATES)).format(term="", title="").lower()
    assert not any(one.question.lower() in trained for one in general_questions())
    assert "icd" not in general_text().lower()


@pytest.mark.real
def test_the_text_has_about_two_thousand_tokens() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BUILTIN))
    assert 1800 <= len(tokenizer(general_text())["input_ids"]) <= 2200


@pytest.mark.real
def test_the_base_answers_most_questions() -> None:
    """Arm K is only worth watching if there is something to forget."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve_model(BUILTIN)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    right = 0
    for one in general_questions():
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": one.question}], add_generation_prompt=True, return_dict=False)
        losses = []
        for choice in (one.answer, *one.distractors):
            answer = tokenizer(choice)["input_ids"] + [tokenizer.eos_token_id]
            ids = torch.tensor([[*prompt, *answer]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer)).item())
        right += losses[0] == min(losses)
    assert right / len(general_questions()) >= 0.6
