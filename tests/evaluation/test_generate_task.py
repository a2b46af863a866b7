"""Free answers: ends, stops, draws and each metric, held to the packages that define it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import GenerateTask
from finetune.data.formats import Message
from finetune.data.render import Renderer
from finetune.errors import DataError, HardwareError
from finetune.evaluation import measured_rows
from finetune.evaluation.generate_task import measure, metrics_of
from finetune.evaluation.generation import Answer, Decoding, continuations, token_f1
from finetune.scoring import Scorer


def task(source: Path | str = "/rows.jsonl", **settings: Any) -> GenerateTask:
    return GenerateTask.model_validate({"task": "generate", "data": {"source": str(source)}, "max_new_tokens": 8, **settings})


def prompts(tokens: Renderer) -> list[tuple[int, ...]]:
    return [tokens.prompt((Message("user", "What is " + "it " * number + "?"),)) for number in range(1, 9)]


def test_a_window_at_a_time_gives_the_same_figures(
    fp32: Scorer, tokens: Renderer, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = measure(fp32, tokens, "asked", task(chat_file), samples=2, advance=lambda _: None)
    assert len(wanted.answers) == 2
    assert wanted.quantities[0].n == 24
    monkeypatch.setattr(measured_rows, "WINDOW", 5)
    found = measure(fp32, tokens, "asked", task(chat_file), samples=2, advance=lambda _: None)
    assert found.answers == wanted.answers
    assert [one.value for one in found.quantities] == [one.value for one in wanted.quantities]
    assert [one.name for one in found.quantities] == ["asked: exact match", "asked: token F1", "asked: ended by itself"]


def test_a_stop_ends_an_answer_and_is_cut_off(fp32: Scorer, tokens: Renderer) -> None:
    whole = continuations(fp32, tokens, prompts(tokens), Decoding(12))
    stop = next(one.text[3:5] for one in whole if len(one.text) > 8)
    cut = continuations(fp32, tokens, prompts(tokens), Decoding(12, stop=(stop,)))
    for before, after in zip(whole, cut, strict=True):
        assert after.text == before.text.partition(stop)[0].strip()
        assert after.ended == (before.ended or stop in before.text)
    assert any(stop in one.text for one in whole)


def test_the_end_of_the_turn_ends_an_answer(fp32: Scorer, tokens: Renderer) -> None:
    ids, closing = prompts(tokens)[:3], tokens.end_of_turn
    head = fp32.model.get_output_embeddings()
    always = head.register_forward_hook(lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor(closing), 1e4))
    try:
        assert [(one.text, one.ended) for one in continuations(fp32, tokens, ids, Decoding(6))] == [("", True)] * 3
    finally:
        always.remove()
    never = head.register_forward_hook(lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor(closing), -1e4))
    try:
        assert not any(one.ended for one in continuations(fp32, tokens, ids, Decoding(6)))
    finally:
        never.remove()


def greedy_alone(model: Any, tokens: Renderer, prompt: tuple[int, ...], limit: int) -> Answer:
    """No batch, no padding, no cache and no `generate`: the likeliest token of a whole forward pass, again and again."""
    ids, new = list(prompt), []
    while len(new) < limit:
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in (tokens.end_of_turn, tokens.tokenizer.eos_token_id):
            return Answer(tokens.tokenizer.decode(new, skip_special_tokens=True).strip(), ended=True)
        ids.append(token)
        new.append(token)
    return Answer(tokens.tokenizer.decode(new, skip_special_tokens=True).strip(), ended=False)


@pytest.fixture
def attentive(make_tiny_model: Callable[..., Path], tokens: Renderer) -> Iterator[Any]:
    """In fp32, with weights so large that answers follow from the whole prompt, and about half of them end."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tied=False, initializer_range=0.3), dtype=torch.float32).eval()
    more = torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor(tokens.end_of_turn), 4.0)
    hook = model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, logits: logits + more)
    yield model
    hook.remove()


def test_batched_greedy_answers_are_those_of_a_loop_over_single_prompts(attentive: Any, tokens: Renderer) -> None:
    """Prompts of many lengths in one batch, some of whose answers end long before the others."""
    asked = [tokens.prompt((Message("user", "What is " + "it " * (3 * number) + f"{number}?"),)) for number in (7, 2, *range(12))]
    alone = [greedy_alone(attentive, tokens, prompt, 12) for prompt in asked]
    assert len({one.text for one in alone}) >= 8
    assert 4 <= sum(one.ended for one in alone) <= 10
    sizes: list[int] = []
    attentive.register_forward_pre_hook(lambda _module, _args, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    together = continuations(Scorer(attentive, torch.device("cpu"), "fp32", 2048), tokens, asked, Decoding(12))
    assert set(sizes) == {len(asked)}
    assert together == alone


def test_draws_follow_the_seed_and_leave_the_random_state_alone(fp32: Scorer, tokens: Renderer) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    drawn = [continuations(fp32, tokens, prompts(tokens), Decoding(8, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] != continuations(fp32, tokens, prompts(tokens), Decoding(8))


@pytest.mark.parametrize(
    ("metric", "given", "expected", "value"),
    [
        ("exact-match", "Candidal  Sepsis.", "candidal sepsis", 1.0),
        ("token-f1", "the candidal sepsis", "candidal sepsis", 0.8),
        ("rouge-l", "the cat sat", "the cat on the mat sat", 2 * (1.0 * 0.5) / 1.5),
        ("chrf", "candidal sepsis", "candidal sepsis", 1.0),
        ("regex", "code B37.7", "", 1.0),
        ("regex", "no code", "", 0.0),
        ("json", '{"a": [1]}', "", 1.0),
        ("json", "{'a': 1}", "", 0.0),
        ("json", "NaN", "", 0.0),
    ],
)
def test_metrics(metric: str, given: str, expected: str, value: float) -> None:
    settings = {"pattern": r"[A-Z]\d\d"} if metric == "regex" else {}
    assert metrics_of(task(metrics=[metric], **settings))[metric](given, expected) == pytest.approx(value)


def test_f1_of_empty_answers() -> None:
    assert token_f1("", "") == 1.0
    assert token_f1("", "x") == token_f1("x", "y") == 0.0


def test_a_missing_package_is_told_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(HardwareError, match=r"chrf needs sacrebleu") as caught:
        metrics_of(task(metrics=["chrf"]))
    assert caught.value.problems[0].fix == "pip install 'finetune[eval]'"


def test_rows_that_ask_nothing_are_refused(fp32: Scorer, tokens: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "A document."}) + "\n")
    with pytest.raises(DataError, match="asks nothing"):
        measure(fp32, tokens, "asked", task(path), samples=0, advance=lambda _: None)


@pytest.mark.real
def test_batched_greedy_answers_of_the_real_model_are_those_of_single_prompts() -> None:
    from transformers import AutoModelForCausalLM

    from finetune.model.builtin import resolve_model
    from finetune.model.load import load_tokenizer

    directory = resolve_model("builtin:smollm2-135m")
    renderer = Renderer(load_tokenizer(directory))
    scorer = Scorer(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), torch.device("cpu"), "fp32", 1024)
    asked = ["What is the capital of France?", "Name a bone of the hand.", "What does insulin do in the human body, in one sentence?", "Hi"]
    ids = [renderer.prompt((Message("user", text),)) for text in asked]
    together = continuations(scorer, renderer, ids, Decoding(16))
    assert together == [continuations(scorer, renderer, [one], Decoding(16))[0] for one in ids]
    assert "Paris" in together[0].text
