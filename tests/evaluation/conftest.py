"""A random model that does not repeat itself, its renderer, and rows to measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.data.render import Renderer
from finetune.model.load import load_tokenizer
from finetune.scoring import Scorer

QUESTIONS = [
    {
        "question": f"What is the title of disease {number}? " + "It is another name. " * (number % 4),
        "choices": [f"Title {number}", "the disease", f"Another name of {number * 7}", "No"][: 2 + number % 3],
        "answer": number % 2,
    }
    for number in range(13)
]


@pytest.fixture(scope="module")
def talkative_dir(make_tiny_model: Callable[..., Path]) -> Path:
    """Untied, with large weights: a tied random model only ever repeats its last token, which here is a newline."""
    return make_tiny_model(tied=False, initializer_range=0.1)


@pytest.fixture(scope="module")
def fp32(talkative_dir: Path) -> Scorer:
    """The same model in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(talkative_dir, dtype=torch.float32).eval()
    return Scorer(model, torch.device("cpu"), "fp32", 512)


@pytest.fixture(scope="module")
def tokens(talkative_dir: Path) -> Renderer:
    return Renderer(load_tokenizer(talkative_dir))


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multiple choice, 13 rows."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path
