"""Secrets are refused, and no message repeats them (pitfall C3)."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

from finetune.config.dump import dump_config
from finetune.config.load import load_config
from finetune.errors import ConfigError

CANARY = "cAnArY0123456789abcdefgh"
HF = f"hf_{CANARY}"
WANDB = "0123456789abcdef0123456789abcdef01234567"

BY_NAME = [
    "token",
    "hf_token",
    "hub_token",
    "HF_TOKEN",
    "use_auth_token",
    "api_key",
    "wandb_api_key",
    "apikey",
    "password",
    "aws_secret_key",
    "secret",
]


@pytest.mark.parametrize("key", BY_NAME)
@pytest.mark.parametrize("place", ["{}: {}\n", "tracking: {{{}: {}}}\n", "train:\n  {}: {}   # do not commit\n"])
def test_c3_a_key_named_like_a_secret_is_refused_unseen(key: str, place: str, minimal: str, problems: Any):
    found = problems(minimal + place.format(key, CANARY))
    assert len(found) == 1
    assert f"{key}` holds a secret" in found[0].what
    assert CANARY not in str(found[0])
    assert "***" in found[0].excerpt


@pytest.mark.parametrize(
    ("value", "login"),
    [
        (HF, "hf auth login"),
        (f"sk-{CANARY}", "environment"),
        (f"sk-ant-{CANARY}", "environment"),
        (WANDB, "wandb login"),
        (f"local-{WANDB}", "wandb login"),
        (f"ghp_{CANARY}", "environment"),
        ("AKIACANARY0123456789", "environment"),
        (f"https://me:{CANARY}@example.org/data", "environment"),
    ],
)
@pytest.mark.parametrize("place", ["output: {}", "model: {{id: {}}}", "wandb: {}", "tuning: {{method: {}}}", "{}: true", "seed: [{}]"])
def test_c3_a_value_that_looks_like_a_secret_is_refused_unseen(value: str, login: str, place: str, problems: Any):
    quoted = f'"{value}"'
    found = problems("tuning: {method: lora}\n" * ("tuning" not in place) + place.format(quoted) + "\n")
    secret = [problem for problem in found if "holds a secret" in problem.what]
    assert len(secret) == 1, found
    assert login in secret[0].fix
    assert not any(value in str(problem) or CANARY in str(problem) for problem in found)


@pytest.mark.parametrize(
    "override",
    [f"hf_token={CANARY}", f"tracking.wandb={HF}", f"model.id={HF}", f"tuning.rank={HF}", f"x.y.{HF}=1", f"api_key=!!str {CANARY}"],
)
def test_c3_overrides_are_masked_too(override: str, minimal: str, problems: Any):
    assert not any(CANARY in str(problem) for problem in problems(minimal, override))


@pytest.mark.parametrize(
    "text", [f'hf_token: "{CANARY}\n', f"api_key: {CANARY}: x\n", f"\ttoken: {CANARY}\n", f"model: {{id: {HF}\n", f"extends: {HF}\n"]
)
def test_c3_errors_of_syntax_and_layers_are_masked(text: str, problems: Any):
    assert not any(CANARY in str(problem) for problem in problems(text))


def test_c3_neither_the_exception_nor_its_traceback_carries_the_secret(tmp_path: Path, minimal: str):
    path = tmp_path / "config.yaml"
    path.write_text(minimal + f"hf_token: {CANARY}\ntrain: {{epochs: '{HF}'}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    shown = "".join(traceback.format_exception(caught.value))
    assert CANARY not in shown
    assert CANARY not in repr(caught.value.problems)


@pytest.mark.parametrize("key", ["max_token", "eos_token", "pad_token", "token_per_device", "tokens"])
def test_names_about_tokens_of_text_are_not_secrets(key: str, minimal: str, problems: Any):
    (problem,) = problems(minimal + f"{key}: 12\n")
    assert problem.what == f"unknown key `{key}` at the top level"
    assert f"{key}: 12" in problem.excerpt


def test_a_commit_is_not_a_secret(minimal: str, load: Any, problems: Any):
    assert load(minimal.replace("id: owner/name", f"id: owner/name, revision: {WANDB}")).config.model.revision == WANDB
    (problem,) = problems(minimal.replace("id: owner/name", f"id: owner/name, revison: {WANDB}"))
    assert "did you mean `revision`?" in problem.fix
    path = f"/cache/snapshots/{WANDB}/train.jsonl"
    assert load(minimal.replace("/data/train.jsonl", path)).config.data.train[0].source == path


def test_c3_environment_variables_are_never_read(minimal: str, problems: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FINETUNE_CANARY", CANARY)
    for text in (minimal.replace("owner/name", "$FINETUNE_CANARY"), minimal.replace("/data", "'${FINETUNE_CANARY}'").replace("'/", "/x'")):
        found = problems(text)
        assert any("environment variables are not read" in problem.what or "not valid YAML" in problem.what for problem in found)
        assert not any(CANARY in str(problem) for problem in found)


def test_c3_the_resolved_configuration_of_a_run_has_no_comment_of_the_file(minimal: str, load: Any):
    assert CANARY not in dump_config(load(minimal + f"# {CANARY}\n").config)
