"""Combinations that cannot work are found before anything is loaded; those that can are left alone."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from finetune.config.data import Format
from finetune.config.data_checks import COLUMNS
from finetune.config.methods import FACTS
from finetune.config.optimizer_checks import UNREAD
from finetune.config.schema import ROLES, Optimizer, Tuning
from finetune.data.formats import _FORMATS

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
HUB = f"{{source: 'hub:owner/name', revision: {'a' * 40}"
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
    (
        "codes that nobody teaches",
        {"data": ICD, "evaluation": "{tasks: [{task: knowledge, asks: [knowledge, code]}]}"},
        "`code` is asked, and no source teaches it",
        "code",
    ),
    (
        "questions twice",
        {"data": ICD, "evaluation": "{tasks: [{task: knowledge, asks: [memory, memory]}]}"},
        "`memory` is listed twice",
        "memory",
    ),
    (
        "one fact shuffled",
        {"data": ICD.replace("icd10cm'", "icd10cm', document_facts: 1, question_facts: 0, answers: shuffled")},
        "the answers of one fact cannot be shuffled",
        "answers",
    ),
    ("knowledge of nothing", {"evaluation": "{tasks: [{task: knowledge}]}"}, "no `builtin:icd10cm` source", "knowledge"),
    ("task twice", {"evaluation": "{tasks: [{task: loss}, {task: loss}]}"}, "two tasks are called `validation`", "loss"),
    (
        "task names twice",
        {"evaluation": "{tasks: [{task: loss, name: own, data: {source: /a}}, {task: choices, name: own, data: {source: /b}}]}"},
        "two tasks are called `own`",
        "choices",
    ),
    (
        "pattern of nobody",
        {"evaluation": "{tasks: [{task: generate, data: {source: /a.jsonl}, pattern: x}]}"},
        "read by the metric `regex` alone",
        "pattern",
    ),
    (
        "regex of nothing",
        {"evaluation": "{tasks: [{task: generate, data: {source: /a.jsonl}, metrics: [regex]}]}"},
        "needs a `pattern`",
        "metrics",
    ),
    (
        "broken pattern",
        {"evaluation": "{tasks: [{task: generate, data: {source: /a.jsonl}, metrics: [regex], pattern: '('}]}"},
        "no regular expression",
        "pattern",
    ),
    (
        "greedy top_p",
        {"evaluation": "{tasks: [{task: generate, data: {source: /a.jsonl}, top_p: 0.9}]}"},
        "no effect on greedy answers",
        "top_p",
    ),
    (
        "weight of measured rows",
        {"evaluation": "{tasks: [{task: loss, data: {source: /a.jsonl, weight: 2}}]}"},
        "no meaning where rows are measured",
        "weight",
    ),
    (
        "columns of choices",
        {"evaluation": "{tasks: [{task: choices, data: {source: /a.jsonl, columns: {prompt: q}}}]}"},
        "no column of the task `choices`",
        "prompt",
    ),
    ("huge rate", {"optimizer": "{learning_rate: 0.5}"}, "a learning rate of 0.5 destroys the model", "learning_rate"),
    ("huge ratio", {"optimizer": "{learning_rate: 1e-3, groups: {mlp: {lr_ratio: 100}}}"}, "a learning rate of 0.1", "lr_ratio"),
    ("huge group rate", {"optimizer": "{groups: {mlp: {learning_rate: 0.2}}}"}, "a learning rate of 0.2", "learning_rate"),
    ("huge LoRA+", {"optimizer": "{learning_rate: 1e-2, lora_plus_ratio: 16}"}, "a learning rate of 0.16", "lora_plus_ratio"),
    ("revision of a builtin", {"model": f"{{id: 'builtin:smollm2-135m', revision: {'a' * 40}}}"}, "the model is built in", "revision"),
    ("revision of a directory", {"model": f"{{id: ./model, revision: {'a' * 40}}}"}, "the model is a directory", "revision"),
    ("unknown builtin model", {"model": "{id: 'builtin:smollm2'}"}, "there is no `builtin:smollm2`", "smollm2"),
    ("unknown builtin data", {"data": "{train: [{source: 'builtin:icd10'}]}"}, "there is no `builtin:icd10`", "icd10"),
    ("directory without its dot", {"model": "{id: models/llama/8b}"}, "neither a hub id nor a directory", "models"),
    ("data from the web", {"data": "{train: [{source: 'https://example.org/a.jsonl'}]}"}, "web addresses are never fetched", "https"),
    ("environment variable", {"output": "$HOME/runs"}, "environment variables are not read", "$HOME"),
    (
        "pissa on nf4",
        {"tuning": "{method: lora, init: {method: pissa}}", "quantization": "{method: nf4}"},
        "takes the largest directions out of the base",
        "pissa",
    ),
    ("olora on int8", {"tuning": "{method: lora, init: {method: olora}}", "quantization": "{method: int8}"}, "the base is int8", "olora"),
    ("pissa with DoRA", {"tuning": "{method: lora, dora: true, init: {method: pissa}}"}, "they do not compose", "pissa"),
    ("olora with DoRA", {"tuning": "{method: lora, dora: true, init: {method: olora}}"}, "they do not compose", "olora"),
    (
        "odd rank of a pattern, orthogonal",
        {"tuning": "{method: lora, init: {method: orthogonal}, rank_pattern: {'layers[.]0': 5}}"},
        "5 is odd",
        "layers",
    ),
    (
        "bad rank pattern",
        {"tuning": "{method: lora, rank_pattern: {'layers.(1': 4}}"},
        "of `tuning.rank_pattern` is not a valid regular expression",
        "layers",
    ),
    (
        "bad alpha pattern",
        {"tuning": "{method: lora, alpha_pattern: {'*_proj': 4}}"},
        "of `tuning.alpha_pattern` is not a valid regular expression",
        "_proj",
    ),
    (
        "bad target pattern of another method",
        {"tuning": "{method: vera, targets: {regex: '*_proj'}}"},
        "not a valid regular expression",
        "regex",
    ),
    ("head as target of another method", {"tuning": "{method: adalora, targets: [lm_head]}"}, "no adapter can go to `lm_head`", "lm_head"),
    ("spectrum in a list", {"tuning": "{method: lora, targets: [spectrum]}"}, "no adapter can go to `spectrum`", "spectrum"),
    ("AdaLoRA that would grow", {"tuning": "{method: adalora, rank: 8, init_rank: 4}"}, "4 is not above 8", "init_rank"),
    (
        "AdaLoRA without a step to prune",
        {"tuning": "{method: adalora, warmup_ratio: 0.5, final_ratio: 0.5}"},
        "no step is left for pruning",
        "final_ratio",
    ),
    (
        "prefix with checkpointing",
        {"tuning": "{method: prefix}", "train": "{gradient_checkpointing: true}"},
        "gradient checkpointing would lose",
        "gradient_checkpointing",
    ),
    (
        "prefix with offload",
        {"tuning": "{method: prefix}", "train": "{gradient_checkpointing: offload}"},
        "gradient checkpointing would lose",
        "gradient_checkpointing",
    ),
    (
        "compiled and offloaded",
        {"train": "{compile: true, gradient_checkpointing: offload}"},
        "`offload` moves what lies between them",
        "compile",
    ),
    (
        "compiled and spread",
        {"train": "{compile: true}", "distributed": "{strategy: fsdp}"},
        "compiled blocks are not gathered",
        "strategy",
    ),
    (
        "new tokens twice",
        {"model": "{id: owner/name, new_tokens: ['<a>', '<b>', '<a>']}", "tuning": "{method: lora, embeddings: new-tokens}"},
        "`<a>` is added twice",
        "new_tokens",
    ),
    ("rows of no new tokens", {"tuning": "{method: lora, embeddings: new-tokens}"}, "and there are none", "new-tokens"),
    ("new tokens that stay frozen", {"model": "{id: owner/name, new_tokens: ['<a>']}"}, "they are frozen", "new_tokens"),
    (
        "new tokens under a low-rank update",
        {"model": "{id: owner/name, new_tokens: ['<a>']}", "tuning": "{method: lora, embeddings: lora}"},
        "a low-rank update cannot write new rows",
        "new_tokens",
    ),
    (
        "new tokens for another method",
        {"model": "{id: owner/name, new_tokens: ['<a>']}", "tuning": "{method: vera}"},
        "`vera` cannot train them",
        "new_tokens",
    ),
    (
        "new tokens in chosen layers",
        {"model": "{id: owner/name, new_tokens: ['<a>']}", "tuning": "{method: full, targets: {spectrum: 0.5}}"},
        "linear weights of the layers alone",
        "new_tokens",
    ),
    ("GaLore under LoRA", {"optimizer": "{method: galore}"}, "gradients of whole weights", "galore"),
    (
        "GaLore's settings for another",
        {"optimizer": "{method: adamw, galore: {rank: 64}}"},
        "`optimizer.galore` goes with `method: galore`",
        "galore",
    ),
    (
        "LoRA+ without factors",
        {"tuning": "{method: vera}", "optimizer": "{lora_plus_ratio: 16}"},
        "it is for `lora` or `tied-lora`, not `vera`",
        "lora_plus_ratio",
    ),
    ("Adafactor with beta1", {"optimizer": "{method: adafactor, beta1: 0.8}"}, "`adafactor` does not read `optimizer.beta1`", "beta1"),
    ("Adafactor with beta2", {"optimizer": "{method: adafactor, beta2: 0.99}"}, "`adafactor` does not read `optimizer.beta2`", "beta2"),
    (
        "Adafactor with epsilon",
        {"optimizer": "{method: adafactor, epsilon: 1e-6}"},
        "`adafactor` does not read `optimizer.epsilon`",
        "epsilon",
    ),
    ("Lion with epsilon", {"optimizer": "{method: lion, epsilon: 1e-6}"}, "its update is a sign", "epsilon"),
    ("8-bit Lion with epsilon", {"optimizer": "{method: lion-8bit, epsilon: 1e-6}"}, "`lion-8bit` does not read", "epsilon"),
    (
        "Muon without matrices",
        {"tuning": "{method: norm}", "optimizer": "{method: muon}"},
        "`tuning.method: norm` trains vectors only",
        "muon",
    ),
    (
        "factors in VeRA",
        {"tuning": "{method: vera}", "optimizer": "{groups: {lora-b: {lr_ratio: 2}}}"},
        "`vera` has no factors A and B",
        "lora-b",
    ),
    (
        "magnitudes in tied LoRA",
        {"tuning": "{method: tied-lora}", "optimizer": "{groups: {magnitudes: {lr_ratio: 2}}}"},
        "only DoRA has magnitudes",
        "magnitudes",
    ),
    (
        "layers in prompt tuning",
        {"tuning": "{method: prompt}", "optimizer": "{groups: {mlp: {lr_ratio: 2}}}"},
        "`prompt` trains no part of the model itself",
        "mlp",
    ),
    (
        "embeddings in AdaLoRA",
        {"tuning": "{method: adalora}", "optimizer": "{groups: {embeddings: {lr_ratio: 2}}}"},
        "embeddings is frozen under `adalora`",
        "embeddings",
    ),
    (
        "mlp outside the targets of AdaLoRA",
        {"tuning": "{method: adalora, targets: attention}", "optimizer": "{groups: {mlp: {lr_ratio: 2}}}"},
        "`tuning.targets` is `attention`",
        "mlp",
    ),
    (
        "attention without a bottleneck",
        {"tuning": "{method: houlsby, placement: mlp}", "optimizer": "{groups: {attention: {lr_ratio: 2}}}"},
        "`tuning.placement` is `mlp`",
        "attention",
    ),
    (
        "norms in chosen layers",
        {"tuning": "{method: full, targets: {spectrum: 0.5}}", "optimizer": "{groups: {norms: {lr_ratio: 2}}}"},
        "linear weights of the layers alone",
        "norms",
    ),
    (
        "column of another format",
        {"data": "{train: [{source: /a.jsonl, format: text, columns: {question: Frage}}], validation: {fraction: 0.1}}"},
        "`question` is not a column of `text`",
        "question",
    ),
    (
        "column of no format",
        {"data": "{train: [{source: /a.jsonl, columns: {qestion: Frage}}], validation: {fraction: 0.1}}"},
        "`qestion` is not a column of any format",
        "qestion",
    ),
    (
        "columns the wrong way round",
        {"data": "{train: [{source: /a.jsonl, columns: {Frage: question}}], validation: {fraction: 0.1}}"},
        "`Frage` is not a column of any format",
        "Frage",
    ),
    (
        "one column for two",
        {"data": "{train: [{source: /a.jsonl, columns: {question: text, answer: text}}], validation: {fraction: 0.1}}"},
        "are both read from `text`",
        "answer",
    ),
    (
        "hub split twice",
        {"data": f"{{train: [{HUB}}}, {HUB}}}], validation: {{fraction: 0.1}}}}"},
        "`hub:owner/name` is listed twice",
        "hub:owner",
    ),
]


@pytest.mark.parametrize(("parts", "what", "at"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_cannot_work_is_refused(parts: dict[str, str], what: str, at: str, problems: Any, line_of: Any):
    whole = text(**parts)
    (problem,) = problems(whole)
    assert what in problem.what
    assert at in whole.splitlines()[line_of(problem) - 1]
    assert problem.fix


def test_every_method_has_a_row_of_facts():
    assert set(FACTS) == set(get_args(get_args(Tuning)[0]))
    assert {role for row in FACTS.values() for role in row.roles} == set(ROLES)


def test_every_key_that_an_optimizer_does_not_read_exists():
    methods = get_args(Optimizer.model_fields["method"].annotation)
    assert set(UNREAD) < set(methods)
    assert {key for keys in UNREAD.values() for key in keys} <= set(Optimizer.model_fields)


def test_every_format_has_columns():
    assert set(COLUMNS) == set(get_args(Format)) - {"auto"} == set(_FORMATS)
    assert {name: set(columns) for name, columns in COLUMNS.items()} == {
        name: {*known.columns, *known.optional} for name, known in _FORMATS.items()
    }


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
    "every start on a plain base": {"tuning": "{method: lora, init: {method: pissa}}"},
    "orthogonal on nf4": {"tuning": "{method: lora, init: {method: orthogonal}}", "quantization": "{method: nf4}"},
    "eva on nf4": {"tuning": "{method: lora, init: {method: eva, rows: 8}}", "quantization": "{method: nf4}"},
    "loftq with DoRA": {"tuning": "{method: lora, dora: true, init: {method: loftq, exact: true}}", "quantization": "{method: nf4}"},
    "patterns of ranks": {"tuning": "{method: lora, rank_pattern: {'layers[.]0[.]': 8}, alpha_pattern: {'q_proj': 8}}"},
    "spectrum on nf4": {"tuning": "{method: lora, targets: {spectrum: 0.5}}", "quantization": "{method: nf4}"},
    "spectrum in full": {"tuning": "{method: full, targets: {spectrum: 0.25}}", "optimizer": "{groups: {mlp: {lr_ratio: 0.5}}}"},
    "new tokens": {"model": "{id: owner/name, new_tokens: ['<a>']}", "tuning": "{method: lora, embeddings: new-tokens}"},
    "new tokens in whole embeddings": {"model": "{id: owner/name, new_tokens: ['<a>']}", "tuning": "{method: lora, embeddings: full}"},
    "new tokens in full": {"model": "{id: owner/name, new_tokens: ['<a>']}", "tuning": "{method: full}"},
    "GaLore": {"tuning": "{method: full}", "optimizer": "{method: galore, galore: {rank: 64}}"},
    "GaLore's defaults": {"tuning": "{method: full}", "optimizer": "{method: galore}"},
    "LoRA+ of tied factors": {"tuning": "{method: tied-lora}", "optimizer": "{lora_plus_ratio: 16}"},
    "Adafactor with the defaults stated": {"optimizer": "{method: adafactor, beta1: 0.9, weight_decay: 0.1}"},
    "Lion's betas": {"optimizer": "{method: lion, beta2: 0.99}"},
    "Muon's momentum": {"optimizer": "{method: muon, beta1: 0.95, epsilon: 1e-6}"},
    "bf16 weights and paged states": {"optimizer": "{method: paged-adamw-8bit}", "train": "{trainable_dtype: bf16}"},
    "prefix, checkpointing left open": {"tuning": "{method: prefix, tokens: 8}", "train": "{gradient_checkpointing: auto}"},
    "compiled and checkpointed": {"train": "{compile: true, gradient_checkpointing: true}"},
    "prompt with offload": {"tuning": "{method: prompt, text: Answer.}", "train": "{gradient_checkpointing: offload}"},
    "prompt with checkpointing": {"tuning": "{method: prompt, text: Answer.}", "train": "{gradient_checkpointing: true}"},
    "rates of norms": {"tuning": "{method: norm}", "optimizer": "{groups: {norms: {lr_ratio: 2}}}"},
    "AdaLoRA": {"tuning": "{method: adalora, rank: 8, init_rank: 12}"},
    "columns": {"data": "{train: [{source: /a.jsonl, format: alpaca, columns: {input: A, output: B}}]}"},
    "two splits of a hub dataset": {"data": f"{{train: [{HUB}}}], validation: [{HUB}, split: test}}]}}"},
    "splitting": {"data": "{train: [{source: /a.jsonl}], overlong: split, duplicates: drop, near_duplicates: drop, processes: 2}"},
    "tied-lora on nf4": {"tuning": "{method: tied-lora}", "quantization": "{method: nf4}"},
    "tied-lora on int8": {"tuning": "{method: tied-lora}", "quantization": "{method: int8}"},
    "adalora on nf4": {"tuning": "{method: adalora}", "quantization": "{method: nf4}"},
    "adalora on int8": {"tuning": "{method: adalora}", "quantization": "{method: int8}"},
    "vera on nf4": {"tuning": "{method: vera}", "quantization": "{method: nf4}"},
    "vera on int8": {"tuning": "{method: vera}", "quantization": "{method: int8}"},
    "ia3 on nf4": {"tuning": "{method: ia3}", "quantization": "{method: nf4}"},
    "ia3 on int8": {"tuning": "{method: ia3}", "quantization": "{method: int8}"},
    "prompt on nf4": {"tuning": "{method: prompt}", "quantization": "{method: nf4}"},
    "prompt on int8": {"tuning": "{method: prompt}", "quantization": "{method: int8}"},
    "prefix on nf4": {"tuning": "{method: prefix}", "quantization": "{method: nf4}"},
    "prefix on int8": {"tuning": "{method: prefix}", "quantization": "{method: int8}"},
    "norm on nf4": {"tuning": "{method: norm}", "quantization": "{method: nf4}"},
    "norm on int8": {"tuning": "{method: norm}", "quantization": "{method: int8}"},
    "houlsby on nf4": {"tuning": "{method: houlsby}", "quantization": "{method: nf4}"},
    "houlsby on int8": {"tuning": "{method: houlsby}", "quantization": "{method: int8}"},
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
