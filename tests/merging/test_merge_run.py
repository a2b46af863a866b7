"""From a run directory to a merged model: what the run recorded reaches the merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import api
from finetune.errors import ConfigError

Run = Callable[..., Path]


@pytest.mark.parametrize("embeddings", ["new-tokens", "full"])
def test_a8_a_run_with_new_tokens_is_merged_with_its_vocabulary(
    write_config: Run, train_here: Run, tmp_path: Path, embeddings: str
) -> None:
    tokens = ["<icd>", "<note>"]
    base = json.loads(write_config("base.yaml").read_text())["model"]["id"]
    config = write_config(
        model={"id": base, "new_tokens": tokens},
        quantization={"method": "nf4"},
        tuning={"method": "lora", "rank": 4, "embeddings": embeddings},
    )
    report = api.merge(train_here(config), tmp_path / "merged", dtype="fp32")
    assert report.parity.max_logit_difference < 1e-4
    assert not report.fold.untied
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == len(tokenizer) == 322
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tokenizer("a <note> b")["input_ids"].count(tokenizer.convert_tokens_to_ids("<note>")) == 1


@pytest.mark.parametrize(
    "tuning",
    [{"method": "lora", "rank": 8, "alpha": 16}, {"method": "adalora", "rank": 2, "init_rank": 4, "every_steps": 1}, {"method": "vera"}],
    ids=lambda tuning: tuning["method"],
)
def test_a12_an_adapter_that_trained_in_bf16_is_merged_in_fp32(
    write_config: Run, train_here: Run, tmp_path: Path, tuning: dict[str, object]
) -> None:
    """PEFT rounds such an update to bf16 when asked for it; what the layer computes with, factor by factor, is what is merged."""
    train = {"epochs": 3, "batch_size": 8, "precision": "bf16", "tokens_per_device": 512, "trainable_dtype": "bf16"}
    run = train_here(write_config(tuning=tuning, optimizer={"learning_rate": 0.05}, train=train))
    report = api.merge(run, tmp_path / "merged", dtype="fp32")
    assert report.trials[0].identity is not None
    assert report.trials[0].identity < 1e-5
    assert report.parity.gain_kept == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("method", ["prompt", "prefix", "houlsby", "full"])
def test_what_is_no_change_of_a_weight_is_refused_with_an_alternative(
    write_config: Run, train_here: Run, tmp_path: Path, method: str
) -> None:
    short = {"epochs": 1, "batch_size": 24, "precision": "fp32", "tokens_per_device": 512}
    run = train_here(write_config(tuning={"method": method}, train=short))
    with pytest.raises(ConfigError, match=r"cannot be merged|nothing to merge") as caught:
        api.merge(run, tmp_path / "merged")
    assert str(run) in caught.value.problems[0].fix
    assert not (tmp_path / "merged").exists()
