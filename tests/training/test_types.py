"""Trainable weights in bf16: what cannot compute in fp32 is refused before it runs, and what can is merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import api
from finetune.config.load import load_config
from finetune.config.tuning_checks import needs_bf16
from finetune.errors import ConfigError
from finetune.hardware import detect
from finetune.planning.resolve import Choice, resolve
from finetune.training.build import Materials, build_model

SPECTRUM = {"tuning": {"method": "full", "targets": {"spectrum": 0.5}}}
ADALORA = {"tuning": {"method": "adalora", "rank": 2, "init_rank": 4, "every_steps": 1}, "quantization": {"method": "int8"}}


def train(precision: str, **changes: object) -> dict[str, object]:
    return {
        "epochs": 1,
        "max_steps": 2,
        "batch_size": 8,
        "precision": precision,
        "tokens_per_device": 256,
        "trainable_dtype": "bf16",
        **changes,
    }


@pytest.mark.parametrize("parts", [SPECTRUM, ADALORA], ids=["spectrum", "adalora-int8"])
def test_bf16_weights_that_need_bf16_products_are_refused_in_fp32(write_config: Callable[..., Path], parts: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"`train.trainable_dtype: bf16` needs `precision: bf16` here") as caught:
        load_config(write_config(**parts, train=train("fp32")))
    assert "trainable_dtype: fp32" in caught.value.problems[0].fix
    for allowed in (train("bf16"), train("fp32", trainable_dtype="fp32")):
        assert load_config(write_config(**parts, train=allowed)).config.train.trainable_dtype


@pytest.mark.parametrize("parts", [SPECTRUM, ADALORA], ids=["spectrum", "adalora-int8"])
def test_an_automatic_precision_of_fp32_is_refused_by_the_same_rule(
    write_config: Callable[..., Path], tiny_model_dir: Path, parts: dict[str, Any]
) -> None:
    config = load_config(write_config(**parts, train=train("auto"))).config
    resolved = replace(resolve(config, detect()), precision=Choice("fp32", "this machine has no bf16"))
    with pytest.raises(ConfigError, match="`auto` chose fp32"):
        build_model(config, Materials(tiny_model_dir, resolved, (), ()), torch.device("cpu"))


@pytest.mark.parametrize(
    "parts",
    [{"tuning": {"method": "full"}}, {"tuning": {"method": "lora"}}, ADALORA | {"quantization": {"method": "nf4"}}],
    ids=["full", "lora", "adalora-nf4"],
)
def test_what_computes_in_either_type_is_not_refused(write_config: Callable[..., Path], parts: dict[str, Any]) -> None:
    assert needs_bf16(load_config(write_config(**parts, train=train("fp32"))).config) is None


@pytest.mark.usefixtures("measured_here")
def test_adalora_on_int8_that_trained_in_bf16_is_merged(
    write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path
) -> None:
    run = train_here(write_config(**ADALORA, optimizer={"learning_rate": 0.05}, train=train("bf16", max_steps=3)))
    api.merge(run, tmp_path / "merged", dtype="fp32")
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["dtype"] == "fp32"


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.usefixtures("measured_here")
def test_fp32_embeddings_train_under_bf16_products(
    write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path, quantization: str, dora: bool
) -> None:
    """Their fp32 states reach attention as they are, beside keys and values of bf16 factors."""
    tuning = {"method": "lora", "rank": 4, "alpha": 8, "embeddings": "full", "dora": dora}
    stated = train("bf16", trainable_dtype="fp32")
    run = train_here(write_config(tuning=tuning, quantization={"method": quantization}, train=stated))
    assert api.merge(run, tmp_path / "merged", dtype="fp32").parity.mean_kl < 1e-2
