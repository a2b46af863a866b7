"""Whatever the bytes, the answer is a configuration or a ConfigError: never a traceback, never a hang."""

from __future__ import annotations

import time
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.config.load import Loaded
from finetune.errors import ConfigError

TEXT = """\
extends: style
model: {id: owner/name}
quantization: {method: nf4}
tuning: {method: lora, targets: [q_proj], init: {method: loftq}}
optimizer: {groups: {attention: {lr_ratio: 2}}}
data: {train: [{source: /data/train.jsonl}], validation: {fraction: 0.1}}
evaluation: {tasks: [{task: loss}]}
output: runs/test
"""
SECTIONS = (
    "model",
    "quantization",
    "tuning",
    "optimizer",
    "schedule",
    "data",
    "train",
    "evaluation",
    "distributed",
    "tracking",
    "seed",
    "output",
)

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["lora", "nf4", "full", "loss", "a.jsonl"])
)
keys = st.sampled_from(
    ["method", "rank", "source", "task", "fraction", "groups", "train", "tasks", "targets", "regex", "init", "x"]
) | st.text(max_size=4)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8)


def answer(load: Any, text: str | bytes, *overrides: str) -> Loaded | ConfigError:
    found: Loaded | ConfigError
    try:
        found = load(text, *overrides)
    except ConfigError as error:
        found = error
    assert isinstance(found, Loaded) or all(problem.what and problem.where for problem in found.problems)
    return found


@quick
@given(
    position=st.integers(0, len(TEXT) - 1),
    inserted=st.text("{}[]:,&*!|>'\"%@`#-? \t\n\r\u2028\x85é~", max_size=3),
    removed=st.integers(0, 4),
)
def test_a_damaged_file(position: int, inserted: str, removed: int, load: Any):
    answer(load, TEXT[:position] + inserted + TEXT[position + removed :])


@quick
@given(data=st.binary(max_size=200))
def test_any_bytes(data: bytes, load: Any):
    assert isinstance(answer(load, data), ConfigError)


@quick
@given(section=st.sampled_from(SECTIONS), value=values)
@example(section="tuning", value={"method": "lora", "targets": {}})
@example(section="data", value={"train": [{"source": {"source": "builtin:icd10cm"}}]})
@example(section="evaluation", value={"tasks": [{"task": ["loss"]}]})
@example(section="tuning", value={"method": ["lora"]})
def test_any_value_in_any_section(section: str, value: Any, load: Any):
    import json

    lines = [line for line in TEXT.splitlines() if not line.startswith((section, "extends"))]
    answer(load, "\n".join([*lines, f"{section}: {json.dumps(value).replace('NaN', '.nan').replace('Infinity', '.inf')}"]) + "\n")


@quick
@given(key=st.text("a.0\"'[]-= tuningrank", max_size=12), value=st.text("{}[]:,&*!'\"- a1\n", max_size=6))
def test_any_override(key: str, value: str, load: Any):
    answer(load, TEXT, f"{key}={value}")


@quick
@given(
    path=st.sampled_from(
        ["tuning", "tuning.init", "data.train.0", "data.validation", "optimizer.groups", "evaluation.tasks.0", "tuning.targets.0"]
    ),
    value=values,
)
@example(path="data.validation", value={"": "split"})  # the kind that was probably meant leaves the same complaint at the same place
def test_any_value_of_an_override(path: str, value: Any, load: Any):
    import json

    answer(load, TEXT, f"{path}={json.dumps(value).replace('NaN', '.nan').replace('Infinity', '.inf')}")


def test_c8_the_worst_file_is_refused_in_seconds(load: Any):
    for text in ("a: " + "[" * 250_000, "- " * 125_000, "{" * 250_000, "a: &a\n" * 40_000, "? " * 120_000, '"' * 250_000, "a:\n" * 60_000):
        start = time.process_time()
        assert isinstance(answer(load, text), ConfigError)
        assert time.process_time() - start < 60  # without limits: minutes to never
