"""The loss of rows of one's own, held to a script that shares no code; rows are read a window at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import LossTask
from finetune.data.render import Example, Renderer
from finetune.errors import DataError
from finetune.evaluation import measured_rows
from finetune.evaluation.loss_task import measure_rows
from finetune.scoring import Scorer


def task(source: Path, **settings: Any) -> LossTask:
    return LossTask.model_validate({"task": "loss", "data": {"source": str(source)}, **settings})


def nothing(_: int) -> None:
    """Nobody watches."""


def independent_loss(directory: Path, rows: list[dict[str, Any]]) -> float:
    """Transformers alone, a row at a time: the assistant's turns and the tokens that end them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        answer = tokenizer(row["messages"][-1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"] + answer])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1].double()
        nats = -logits.log_softmax(-1).gather(1, ids[0, start:, None])
        total, count = total + float(nats.sum()), count + len(answer)
    return total / count


@pytest.mark.parametrize("max_tokens", [64, 4096])
def test_a16_the_loss_is_that_of_an_independent_script(
    fp32: Scorer, tokens: Renderer, talkative_dir: Path, chat_file: Path, max_tokens: int
) -> None:
    scorer = Scorer(fp32.model, fp32.device, "fp32", max_tokens)
    found = measure_rows(scorer, tokens, "own", task(chat_file), nothing)
    loss = found.named("own: loss")
    assert loss is not None
    rows = [json.loads(line) for line in chat_file.read_text().splitlines()]
    assert loss.value == pytest.approx(independent_loss(talkative_dir, rows), abs=1e-5)
    assert loss.n == len(rows)
    perplexity = found.named("own: perplexity")
    assert perplexity is not None
    assert perplexity.value == pytest.approx(math.exp(loss.value))


def test_every_token_of_a_text_counts_once_however_it_is_cut(fp32: Scorer, tokens: Renderer, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "Doctors call this disease by another name. " * 9}) + "\n")
    whole = measure_rows(fp32, tokens, "text", task(text, max_tokens=4096), nothing).quantities[0]
    cut = measure_rows(fp32, tokens, "text", task(text, max_tokens=16), nothing).quantities[0]
    assert whole.n == 1
    assert cut.n > 5  # blocks are items, so that a single document has an interval
    assert cut.denominators.sum() == whole.denominators.sum()


class Counting:
    """A scorer that only counts: how much it is handed at a time, and in all."""

    def __init__(self) -> None:
        self.most = self.all = 0

    def losses(self, examples: Sequence[Example], advance: Callable[[int], None]) -> Iterator[tuple[int, torch.Tensor]]:
        self.most, self.all = max(self.most, len(examples)), self.all + len(examples)
        advance(len(examples))
        return ((place, torch.ones(example.supervised)) for place, example in enumerate(examples))


@pytest.mark.parametrize("rows", [100, 1000])
def test_b5_no_more_rows_are_held_than_a_window_has(tokens: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(measured_rows, "WINDOW", 64)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {number}?", "answer": "A title"}) + "\n" for number in range(rows)))
    scorer: Any = Counting()
    found = measure_rows(scorer, tokens, "rows", task(path), nothing)
    assert scorer.all == found.quantities[0].n == rows
    assert scorer.most == 64
    assert found.quantities[0].value == 1.0


def test_rows_that_cannot_be_measured_are_told_together(fp32: Scorer, tokens: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"question": "What?", "answer": "This"})
    path.write_text(f"{good}\n{json.dumps({'qestion': 'What?'})}\n{good}\n{json.dumps({'question': '', 'answer': 'x'})}\n")
    with pytest.raises(DataError) as caught:
        measure_rows(fp32, tokens, "rows", task(path), nothing)
    assert [problem.where.rpartition(":")[2] for problem in caught.value.problems] == ["2", "4"]
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"question": "What? " * 50, "answer": "This"}) + "\n")
    with pytest.raises(DataError, match="max_tokens"):
        measure_rows(fp32, tokens, "rows", task(long, max_tokens=16), nothing)
    with pytest.raises(DataError, match="no row is left"):
        measure_rows(fp32, tokens, "rows", task(long, max_tokens=16, overlong="drop"), nothing)
