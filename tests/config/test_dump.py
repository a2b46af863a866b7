"""What is written into a run directory loads to the same values, whatever the text in it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from finetune.config.dump import dump_config, show_config
from finetune.config.schema import Config

quick = settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@quick
@given(text=st.text(min_size=1, max_size=20))
def test_a7_any_text_survives(text: str, load: Any, minimal: str):
    assume("$" not in text)
    plain = load(minimal).config.model_dump(mode="json")
    config = Config.model_validate({**plain, "output": text})
    assert load(dump_config(config)).config == config
    assert load(show_config(config, {})).config == config


@pytest.mark.parametrize(
    "text", ["no", "1e-4", "null", "~", "- a", "a: b", "a #b", "#", " x ", "'", '"', "\\", "\n", "\u2028", "😀", "x:", "0x1F", "[a]", ""]
)
def test_a7_text_that_looks_like_yaml_survives_as_the_name_of_a_group(text: str, load: Any, minimal: str):
    plain = load(minimal).config.model_dump(mode="json")
    name = f"{text}.*_proj"
    config = Config.model_validate({**plain, "optimizer": {**plain["optimizer"], "groups": {name: {"lr_ratio": 2.0}}}})

    assert load(dump_config(config)).config == config


@quick
@given(number=st.floats(min_value=1e-300, max_value=1.0, exclude_min=True))
def test_a7_any_number_survives_exactly(number: float, load: Any, minimal: str):
    config = load(minimal).config
    changed = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"epsilon": number})})
    assert load(dump_config(changed)).config.optimizer.epsilon == number


def test_a_reason_stands_beside_the_origin(load: Any, minimal: str):
    loaded = load(minimal)
    shown = show_config(loaded.config, loaded.origins, {"train.precision": "here fp32: no bf16 instructions"})
    assert "  precision: auto" in shown
    assert "# default; here fp32: no bf16 instructions" in shown
