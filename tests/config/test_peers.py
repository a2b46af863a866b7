"""Names from other tools lead to the names here."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.config import peers, shape, unavailable
from finetune.config.tree import dotted

PATHS = {dotted(path) for path, _, _ in shape.entries(shape.root())} | {"extends"}


def _exists(path: str) -> bool:
    return path.replace("groups.embeddings", "groups.NAME") in PATHS


def test_the_table_is_long():
    assert len(peers.KEYS) >= 40


@pytest.mark.parametrize("key", peers.KEYS)
def test_each_name_leads_to_a_key_that_exists(key: str, minimal: str, problems: Any):
    path, value = peers.KEYS[key]
    assert _exists(path)
    (problem,) = problems(minimal + f"{key}: 1\n")
    assert problem.what == f"unknown key `{key}` at the top level"
    assert f"`{path}: {value}`" in problem.fix if value else f"`{path}`" in problem.fix


@pytest.mark.parametrize("key", ["lora_r", "lora_alpha", "per_device_train_batch_size", "load_in_4bit", "use_rslora"])
@pytest.mark.parametrize("section", ["train", "model", "optimizer"])
def test_a_name_is_known_in_every_section(key: str, section: str, problems: Any):
    found = [problem for problem in problems(f"{section}: {{{key}: 1}}\n") if key in problem.what]
    assert len(found) == 1
    assert peers.KEYS[key][0] in found[0].fix


def test_no_name_is_a_key_here_or_in_two_tables():
    keys = {path.rsplit(".", 1)[-1] for path in PATHS}
    assert not keys & set(peers.KEYS)
    assert not keys & unavailable.KEYS
    assert not set(peers.KEYS) & unavailable.KEYS
    assert set(peers.NOTES) <= set(peers.KEYS)
    assert set(unavailable.REASONS) <= unavailable.KEYS


@pytest.mark.parametrize("key", sorted(unavailable.KEYS))
def test_what_is_not_available_says_so(key: str, minimal: str, problems: Any):
    (problem,) = problems(minimal + f"{key}: true\n")
    assert "is not available in this version" in problem.fix


VALUES = [(path, value) for path, values in unavailable.VALUES.items() for value in sorted(values)]


@pytest.mark.parametrize(("path", "value"), VALUES)
def test_values_that_are_not_available_say_so(path: str, value: str, minimal: str, problems: Any):
    base = minimal.replace("{source: /data/train.jsonl}", "{source: /data/train.jsonl, format: auto}")
    text = base + "evaluation: {tasks: [{task: forgetting}]}\nquantization: {method: nf4}\n"
    (problem,) = problems(text, f"{path}={value!r}")
    assert problem.what.startswith(f"`{path}` is ")
    assert "is not available in this version" in problem.fix


SURROUNDINGS = {
    "full": "quantization: {method: none}\n",
    "pissa": "quantization: {method: none}\n",
    "galore": "tuning: {method: full}\nquantization: {method: none}\n",
    "new-tokens": "model: {id: owner/name, new_tokens: ['[<note>]']}\n",
    "both": "tuning: {method: houlsby}\n",
    "mlp": "tuning: {method: houlsby}\n",
    **{task: f"evaluation: {{tasks: [{{task: {task}, data: {{source: /rows.jsonl}}}}]}}\n" for task in ("loss", "generate", "choices")},
    "harness": "evaluation: {tasks: [{task: harness, tasks: [arc_easy]}]}\n",
}
"""Value -> what it needs around it, where that is not the least configuration."""


def _around(path: str, here: str, text: str) -> str:
    sections = SURROUNDINGS.get(here, "") if not path.endswith("targets") else ""
    kept = [line for line in text.splitlines(keepends=True) if f"\n{line.split(':')[0]}:" not in f"\n{sections}"]
    return "".join(kept) + sections


@pytest.mark.parametrize(("path", "value", "here"), [(path, *pair) for path, pairs in peers.VALUES.items() for pair in pairs.items()])
def test_values_of_other_tools_lead_to_values_that_exist(path: str, value: str, here: str, minimal: str, load: Any, problems: Any):
    base = minimal.replace("{source: /data/train.jsonl}", "{source: /data/train.jsonl, format: auto}") + "quantization: {method: nf4}\n"
    base = _around(path, here, base)
    found = [problem for problem in problems(base, f"{path}='{value}'") if f"`{path}`" in problem.what]
    assert f"`{here}`" in found[0].fix
    load(base, f"{path}={here}")
