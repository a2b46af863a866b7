"""From a run directory to a merged model: what the run recorded reaches the merge."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import api
from finetune.errors import ConfigError
from finetune.finished import load_run
from finetune.merging import bases, merge_run, trials
from tests.merging.test_merge import in_process

Run = Callable[..., Path]


@pytest.mark.parametrize("embeddings", ["new-tokens", "full"])
@pytest.mark.usefixtures("measured_here")
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
@pytest.mark.usefixtures("measured_here")
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


def test_the_adapter_model_is_gone_before_the_merge_is_loaded(
    write_config: Run, train_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    measure = trials.measure_in_fresh_process

    def loading(*arguments: Any) -> Any:
        found = load_run(*arguments)
        models.append(weakref.ref(found.model))
        return found

    def measuring(*arguments: Any) -> Any:
        alive.append(any(model() is not None for model in models))
        return measure(*arguments)

    monkeypatch.setattr(merge_run, "load_run", loading)
    monkeypatch.setattr(trials, "measure_in_fresh_process", measuring)
    api.merge(train_here(write_config(quantization={"method": "nf4"})), tmp_path / "merged", dtype="fp32")
    assert alive == [False]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process where the test is about something else: each takes seconds of imports."""
    for module in (trials, bases):
        monkeypatch.setattr(module, "measure_in_fresh_process", in_process)


@pytest.mark.parametrize("loftq", [False, True], ids=["qlora", "loftq"])
@pytest.mark.usefixtures("quick")
def test_a6_a18_both_bases_are_measured(write_config: Run, train_here: Run, tmp_path: Path, loftq: bool) -> None:
    tuning = {"method": "lora", "rank": 8, "alpha": 8, **({"init": {"method": "loftq"}} if loftq else {})}
    run = train_here(write_config(quantization={"method": "nf4"}, tuning=tuning))
    report = api.merge(run, tmp_path / "merged", compare_bases=True, dtype="fp32")
    assert "as quantization left it" in report.why_base
    adapter, chosen, other = report.bases
    assert [figures.model for figures in report.bases] == ["adapter model", "dequantized", "original"]
    assert [figures.chosen for figures in report.bases] == [False, True, False]
    assert chosen.validation_loss == pytest.approx(adapter.validation_loss, abs=1e-4)
    assert chosen.general_loss == pytest.approx(adapter.general_loss, abs=1e-4)
    # the figures of the other base are those of a merge onto it
    direct = api.merge(run, tmp_path / "original", base="original", dtype="fp32")
    assert "as asked" in direct.why_base
    assert other.validation_loss == pytest.approx(direct.parity.loss_merged, abs=1e-6)
    assert abs(other.general_loss - chosen.general_loss) > 1e-5
    described = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert described["bases"][2]["general_loss"] == other.general_loss


def test_one_base_cannot_be_compared(write_config: Run, train_here: Run, tmp_path: Path) -> None:
    run = train_here(write_config())
    with pytest.raises(ConfigError, match="one base only"):
        api.merge(run, tmp_path / "merged", compare_bases=True)


@pytest.mark.parametrize("method", ["pissa", "olora", "loftq"])
@pytest.mark.usefixtures("quick")
def test_a18_a_start_taken_from_the_base_is_taken_away_again(
    write_config: Run, train_here: Run, tmp_path: Path, tiny_model_dir: Path, method: str
) -> None:
    """W + s(BA - B0 A0), densely in fp32 from the last checkpoint and the stored start, against the file on the original base."""
    quantization = {"method": "nf4" if method == "loftq" else "none"}
    tuning = {"method": "lora", "rank": 4, "alpha": 12, "scaling": "rslora", "init": {"method": method}}
    run = train_here(write_config(quantization=quantization, tuning=tuning))
    api.merge(run, tmp_path / "merged", base="original", dtype="fp32")
    start = load_file(run / ("loftq_base.safetensors" if method == "loftq" else "moved_base.safetensors"))
    trained = load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "adapter_model.safetensors")
    written, original = load_file(tmp_path / "merged" / "model.safetensors"), load_file(tiny_model_dir / "model.safetensors")
    modules = sorted({key.rpartition(".start.")[0] for key in start})
    assert len(modules) == 14
    for name in modules:
        a, b = (trained[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        moved = b @ a - start[f"{name}.start.B"] @ start[f"{name}.start.A"]
        assert moved.abs().max() > 1e-4
        expected = original[f"{name}.weight"].float() + 6.0 * moved
        torch.testing.assert_close(written[f"{name}.weight"], expected, rtol=0, atol=2e-6)


@pytest.mark.usefixtures("quick")
def test_every_type_and_rounding_is_measured_on_request(write_config: Run, train_here: Run, tmp_path: Path) -> None:
    run = train_here(write_config(optimizer={"learning_rate": 0.05}))
    report = api.merge(run, tmp_path / "merged", compare_dtypes=True)
    assert [trial.name for trial in report.trials] == [
        "bf16",
        "bf16 with stochastic rounding",
        "fp16",
        "fp16 with stochastic rounding",
        "fp32",
    ]
    assert all(trial.parity and trial.parity.gain_kept for trial in report.trials)
    assert report.chosen.rounding == "nearest"
    described = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert [trial["parity"]["gain_kept"] for trial in described["trials"]] == [
        trial.parity.gain_kept for trial in report.trials if trial.parity
    ]


@pytest.mark.usefixtures("quick")
def test_stochastic_rounding_is_seeded_and_verified(write_config: Run, train_here: Run, tmp_path: Path) -> None:
    run = train_here(write_config(optimizer={"learning_rate": 0.05}))
    found = {}
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        report = api.merge(run, tmp_path / name, dtype="bf16", rounding="stochastic", seed=seed)
        assert (report.dtype, report.rounding) == ("bf16", "stochastic")
        assert report.chosen.identity is not None
        assert report.chosen.identity < 2e-4
        # the seed is recorded, or nobody could make these files again
        assert json.loads((tmp_path / name / "merge.json").read_text())["seed"] == seed
        assert f"--rounding stochastic --seed {seed}" in (tmp_path / name / "README.md").read_text()
        found[name] = load_file(tmp_path / name / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found["a"][key], found["again"][key])
    assert not torch.equal(found["a"][key], found["b"][key])
    assert torch.equal(found["a"]["model.norm.weight"], found["b"]["model.norm.weight"])
