"""Combinations that cannot work are found before anything is loaded; those that can are left alone."""

from __future__ import annotations

from typing import Any

import pytest

PARTS = {
    "model": "{id: owner/name}",
    "quantization": "{method: none}",
    "tuning": "{method: lora}",
    "optimizer": "{method: adamw}",
    "schedule": "{method: cosine}",
    "data": "{train: [{source: /data/train.jsonl}], validation: {fraction: 0.1}}",
    "train": "{epochs: 1}",
    "evaluation": "{samples: 1}",
    "output": "runs/test",
}
ICD = "{train: [{source: 'builtin:icd10cm'}], validation: {fraction: 0.1}}"
NO_VALIDATION = "{train: [{source: /data/train.jsonl}]}"


def text(**parts: str) -> str:
    return "".join(f"{key}: {value}\n" for key, value in {**PARTS, **parts}.items())


CASES: list[tuple[str, dict[str, str], str, str]] = [
    # name, parts, what is said, at
    ("loftq on a plain base", {"tuning": "{method: lora, init: {method: loftq}}"}, "the base is not quantized", "loftq"),
    ("odd rank, orthogonal", {"tuning": "{method: lora, rank: 7, init: {method: orthogonal}}"}, "7 is odd", "rank: 7"),
    ("full on nf4", {"tuning": "{method: full}", "quantization": "{method: nf4}"}, "nf4 weights cannot be trained", "method: full"),
    ("full on int8", {"tuning": "{method: full}", "quantization": "{method: int8}"}, "int8 weights cannot be trained", "method: full"),
    ("full with LoRA+", {"tuning": "{method: full}", "optimizer": "{lora_plus_ratio: 16}"}, "full tuning has neither", "lora_plus_ratio"),
    ("two rates", {"optimizer": "{groups: {mlp: {lr_ratio: 2, learning_rate: 1e-4}}}"}, "both `lr_ratio` and `learning_rate`", "groups"),
    ("idle group", {"optimizer": "{groups: {mlp: {}}}"}, "group `mlp` changes nothing", "groups"),
    ("frozen embeddings", {"optimizer": "{groups: {embeddings: {lr_ratio: 0.1}}}"}, "the embeddings are frozen", "embeddings"),
    ("no magnitudes", {"optimizer": "{groups: {magnitudes: {lr_ratio: 0.1}}}"}, "only DoRA has magnitudes", "magnitudes"),
    ("norms under LoRA", {"optimizer": "{groups: {norms: {lr_ratio: 0.1}}}"}, "norms is frozen under LoRA", "norms"),
    ("head under LoRA", {"optimizer": "{groups: {lm_head: {lr_ratio: 0.1}}}"}, "lm_head is frozen under LoRA", "lm_head"),
    (
        "mlp without targets",
        {"optimizer": "{groups: {mlp: {lr_ratio: 2}}}", "tuning": "{method: lora, targets: attention}"},
        "`tuning.targets` is `attention`",
        "mlp",
    ),
    (
        "attention without targets",
        {"optimizer": "{groups: {attention: {lr_ratio: 2}}}", "tuning": "{method: lora, targets: mlp}"},
        "`tuning.targets` is `mlp`",
        "attention",
    ),
    (
        "lora-a in full",
        {"optimizer": "{groups: {lora-a: {lr_ratio: 2}}}", "tuning": "{method: full}"},
        "full tuning has no adapter",
        "lora-a",
    ),
    (
        "magnitudes in full",
        {"optimizer": "{groups: {magnitudes: {lr_ratio: 2}}}", "tuning": "{method: full}"},
        "has no adapter",
        "magnitudes",
    ),
    ("misspelt role", {"optimizer": "{groups: {embedding: {lr_ratio: 2}}}"}, "group `embedding` is not a role", "embedding"),
    ("role in capitals", {"optimizer": "{groups: {lora_A: {lr_ratio: 2}}}"}, "group `lora_A` is not a role", "lora_A"),
    ("unknown word", {"optimizer": "{groups: {vision: {lr_ratio: 2}}}"}, "neither a role nor a pattern", "vision"),
    ("bad group pattern", {"optimizer": "{groups: {'layers.(1': {lr_ratio: 2}}}"}, "not a valid regular expression", "layers"),
    ("bad target pattern", {"tuning": "{method: lora, targets: {regex: '*_proj'}}"}, "not a valid regular expression", "regex"),
    ("head as target", {"tuning": "{method: lora, targets: [q_proj, lm_head]}"}, "no adapter can go to `lm_head`", "lm_head"),
    ("embeddings as target", {"tuning": "{method: lora, targets: [embed_tokens]}"}, "no adapter can go to `embed_tokens`", "embed_tokens"),
    ("keyword in a list", {"tuning": "{method: lora, targets: [all-linear]}"}, "no adapter can go to `all-linear`", "all-linear"),
    ("two warm-ups", {"schedule": "{warmup_ratio: 0.1, warmup_steps: 3}"}, "both `warmup_ratio` and `warmup_steps`", "schedule"),
    ("endless warm-up", {"schedule": "{warmup_steps: 10}", "train": "{max_steps: 10}"}, "inside the warm-up of 10", "warmup_steps"),
    ("nothing but warm-up", {"schedule": "{warmup_ratio: 1.0}"}, "the whole run would be warm-up", "warmup_ratio"),
    ("floor of a constant", {"schedule": "{method: constant, min_lr_ratio: 0.1}"}, "never reaches `min_lr_ratio`", "min_lr_ratio"),
    (
        "no facts",
        {"data": ICD.replace("icd10cm'", "icd10cm', document_facts: 0, question_facts: 0")},
        "no fact would be trained",
        "document_facts",
    ),
    (
        "source twice",
        {"data": "{train: [{source: /a.jsonl}, {source: /a.jsonl}], validation: {fraction: 0.1}}"},
        "is listed twice",
        "a.jsonl",
    ),
    (
        "validated on training rows",
        {"data": "{train: [{source: /a.jsonl}], validation: [{source: /a.jsonl}]}"},
        "is also trained on",
        "a.jsonl",
    ),
    (
        "stop without validation",
        {"data": NO_VALIDATION, "train": "{early_stopping: {patience: 1}}"},
        "early stopping watches",
        "early_stopping",
    ),
    (
        "evaluate without validation",
        {"data": NO_VALIDATION, "train": "{evaluate: {every_steps: 5}}"},
        "there is no validation data",
        "every_steps",
    ),
    ("loss without validation", {"data": NO_VALIDATION, "evaluation": "{tasks: [{task: loss}]}"}, "the task `loss` needs it", "task: loss"),
    ("knowledge of nothing", {"evaluation": "{tasks: [{task: knowledge}]}"}, "no `builtin:icd10cm` source", "knowledge"),
    ("task twice", {"evaluation": "{tasks: [{task: loss}, {task: loss}]}"}, "the task `loss` is listed twice", "loss"),
    ("huge rate", {"optimizer": "{learning_rate: 0.5}"}, "a learning rate of 0.5 destroys the model", "learning_rate"),
    ("huge ratio", {"optimizer": "{learning_rate: 1e-3, groups: {mlp: {lr_ratio: 100}}}"}, "a learning rate of 0.1", "lr_ratio"),
    ("huge group rate", {"optimizer": "{groups: {mlp: {learning_rate: 0.2}}}"}, "a learning rate of 0.2", "learning_rate"),
    ("huge LoRA+", {"optimizer": "{learning_rate: 1e-2, lora_plus_ratio: 16}"}, "a learning rate of 0.16", "lora_plus_ratio"),
    ("revision of a builtin", {"model": f"{{id: 'builtin:smollm2-135m', revision: {'a' * 40}}}"}, "the model is built in", "revision"),
    ("revision of a directory", {"model": f"{{id: ./model, revision: {'a' * 40}}}"}, "the model is a directory", "revision"),
    ("unknown builtin model", {"model": "{id: 'builtin:smollm2'}"}, "there is no `builtin:smollm2`", "smollm2"),
    ("unknown builtin data", {"data": "{train: [{source: 'builtin:icd10'}]}"}, "there is no `builtin:icd10`", "icd10"),
    ("directory without its dot", {"model": "{id: models/llama/8b}"}, "neither a hub id nor a directory", "models"),
    ("data from the hub", {"data": "{train: [{source: 'hub:owner/name'}]}"}, "data from the hub is not available", "hub:"),
    ("data from the web", {"data": "{train: [{source: 'https://example.org/a.jsonl'}]}"}, "web addresses are never fetched", "https"),
    ("environment variable", {"output": "$HOME/runs"}, "environment variables are not read", "$HOME"),
]


@pytest.mark.parametrize(("parts", "what", "at"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_cannot_work_is_refused(parts: dict[str, str], what: str, at: str, problems: Any, line_of: Any):
    whole = text(**parts)
    (problem,) = problems(whole)
    assert what in problem.what
    assert at in whole.splitlines()[line_of(problem) - 1]
    assert problem.fix


FINE = {
    "loftq on nf4": {"tuning": "{method: lora, init: {method: loftq}}", "quantization": "{method: nf4}"},
    "loftq on int8": {"tuning": "{method: lora, init: {method: loftq}}", "quantization": "{method: int8}"},
    "rates of trained embeddings": {"tuning": "{method: lora, embeddings: lora}", "optimizer": "{groups: {embeddings: {lr_ratio: 0.1}}}"},
    "rates of everything in full": {
        "tuning": "{method: full}",
        "optimizer": "{groups: {embeddings: {lr_ratio: 0.1}, norms: {weight_decay: 0.1}, lm_head: {learning_rate: 1e-5}}}",
    },
    "magnitudes of DoRA": {"tuning": "{method: lora, dora: true}", "optimizer": "{groups: {magnitudes: {lr_ratio: 0.1}}}"},
    "a pattern": {"optimizer": r"{groups: {'layers\.(1|2)\.': {lr_ratio: 0.5}, 'q_proj': {lr_ratio: 2}}}"},
    "no validation": {"data": NO_VALIDATION},
    "knowledge": {"data": ICD, "evaluation": "{tasks: [{task: knowledge}, {task: loss}]}"},
    "two draws of facts": {
        "data": "{train: [{source: 'builtin:icd10cm', seed: 1}, {source: 'builtin:icd10cm', seed: 2}], validation: {fraction: 0.1}}"
    },
    "builtin model": {"model": "{id: 'builtin:smollm2-135m'}"},
    "directory": {"model": "{id: ../models/llama-8b}"},
    "gpt2": {"model": "{id: gpt2}"},
}


@pytest.mark.parametrize("parts", FINE.values(), ids=FINE)
def test_what_works_is_left_alone(parts: dict[str, str], load: Any):
    load(text(**parts))


def test_a_preset_value_is_removed_with_null(folder: Any, load: Any):
    (folder / "warm.yaml").write_text("schedule: {warmup_ratio: 0.1}\n")
    schedule = load(text(schedule="{warmup_ratio: null, warmup_steps: 3}") + "extends: warm.yaml\n").config.schedule
    assert (schedule.warmup_ratio, schedule.warmup_steps) == (None, 3)


def test_checks_run_beside_errors_of_the_schema(problems: Any):
    whole = text(optimizer="{groups: {embeddings: {lr_ratio: 0.1}}}", train="{epochs: zero}", model="{}")
    said = " ".join(problem.what for problem in problems(whole))
    assert "embeddings are frozen" in said
    assert "`train.epochs`" in said
    assert "`model.id` is missing" in said


def test_a_check_is_silent_about_values_that_were_refused(problems: Any):
    found = problems(text(tuning="{method: lora, init: {method: loftq}}", quantization="{method: nf5}"))
    assert ["`quantization.method`" in problem.what for problem in found] == [True]
