"""lm-evaluation-harness as a task, and as the oracle of our own multiple choice and generation on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import ChoicesTask, HarnessTask
from finetune.data.render import Renderer
from finetune.errors import ConfigError, DataError, HardwareError
from finetune.evaluation import choices_task, harness
from finetune.evaluation.choices import score
from finetune.evaluation.generation import Decoding, continuations
from finetune.scoring import Scorer
from tests.evaluation.conftest import QUESTIONS

CHOICES = """
task: own_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: "{delimiter}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWERS = """
task: own_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}, {{metric: bleu}}]
"""


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def written(tmp_path: Path, text: str, **values: object) -> HarnessTask:
    path = tmp_path / "own.yaml"
    path.write_text(text.format(**values))
    return HarnessTask(task="harness", tasks=(str(path),))


@pytest.mark.parametrize("style", ["chat", "text"])
def test_our_choices_are_the_harnesss(fp32: Scorer, tokens: Renderer, questions_file: Path, tmp_path: Path, style: Any) -> None:
    asked = written(tmp_path, CHOICES, rows=questions_file, delimiter="" if style == "chat" else " ").model_copy(update={"style": style})
    theirs = harness.run(fp32, tokens, asked)
    ours_task = ChoicesTask.model_validate({"task": "choices", "data": {"source": str(questions_file)}, "style": style})
    (questions,) = choices_task.question_windows(ours_task)
    ours = score(fp32, [choices_task.continuations(tokens, one, chat=style == "chat") for one in questions])
    samples = sorted(theirs["samples"]["own_choices"], key=lambda sample: sample["doc_id"])
    for sample, scores in zip(samples, ours, strict=True):
        apart = [float(one[0][0]) + nats for one, (nats, _) in zip(sample["resps"], scores, strict=True)]
        # the harness counts white space at the end of a prompt, here the template's line break, with every choice
        assert apart == pytest.approx([apart[0]] * len(apart), abs=1e-4)
        assert style == "chat" or apart[0] == pytest.approx(0.0, abs=1e-4)
    accuracy, normalized, _ = choices_task.measure(fp32, tokens, "own", ours_task, lambda _: None).quantities
    results = theirs["results"]["own_choices"]
    assert accuracy.value == pytest.approx(results["acc,none"])
    assert style == "chat" or normalized.value == pytest.approx(results["acc_norm,none"])


@pytest.mark.parametrize("style", ["chat", "text"])
def test_our_answers_are_the_harnesss(fp32: Scorer, tokens: Renderer, questions_file: Path, tmp_path: Path, style: Any) -> None:
    asked = written(tmp_path, ANSWERS, rows=questions_file).model_copy(update={"style": style})
    done: list[int] = []
    theirs = harness.run(fp32, tokens, asked, done.append)
    assert sum(done) == len(QUESTIONS)
    turns = [({"role": "user", "content": row["question"]},) for row in QUESTIONS]
    template = tokens.tokenizer.apply_chat_template
    texts = [template(list(turn), add_generation_prompt=True, tokenize=False) if style == "chat" else turn[0]["content"] for turn in turns]
    prompts = [tuple(tokens.tokenizer(text)["input_ids"]) for text in texts]
    ours = continuations(fp32, tokens, prompts, Decoding(12, stop=("e",)))
    samples = sorted(theirs["samples"]["own_answers"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0].strip() for sample in samples] == [one.text for one in ours]
    assert len({one.text for one in ours}) > 3


def test_figures_come_with_items_and_others_are_left_out(fp32: Scorer, tokens: Renderer, questions_file: Path, tmp_path: Path) -> None:
    found = harness.measure(fp32, tokens, "harness", written(tmp_path, ANSWERS, rows=questions_file), lambda _: None)
    assert [one.name for one in found.quantities] == ["own_answers: exact_match"]  # BLEU is no mean over answers
    assert found.quantities[0].n == len(QUESTIONS)


def test_perplexities_follow_from_log_likelihoods_and_lengths() -> None:
    items = [(-3.0, 2), (-5.0, 4)]
    (perplexity,) = harness._readings("p", "lower", "word_perplexity", items)
    (bits,) = harness._readings("b", "lower", "bits_per_byte", items)
    assert perplexity.value == pytest.approx(2.718281828 ** (8 / 6))
    assert bits.value == pytest.approx(8 / 6 / 0.69314718)


def test_what_cannot_be_run_is_told_with_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no such task file"):
        harness.require_tasks(HarnessTask(task="harness", tasks=(str(tmp_path / "none.yaml"),)))
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    harness._manager.cache_clear()
    with pytest.raises(HardwareError, match="needs lm_eval") as caught:
        harness.require_tasks(HarnessTask(task="harness", tasks=("own.yaml",)))
    assert "finetune[eval]" in caught.value.problems[0].fix


def test_data_that_is_not_here_is_told(fp32: Scorer, tokens: Renderer, tmp_path: Path) -> None:
    asked = written(tmp_path, ANSWERS, rows=tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="cannot run the task"):
        harness.run(fp32, tokens, asked)
