"""Every method that changes weights, merged: plain transformers computes what the live adapter model does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from finetune.config.schema import EightBit, FourBit, NoQuantization, Quantization, Tuning
from finetune.errors import VerificationError
from finetune.merging.fold import fold
from finetune.merging.identity import require_identity
from finetune.merging.inputs import MergeSource
from finetune.merging.merge import MergeOptions, merge
from finetune.model.adapters import attach, load, save, switched_off, trainable
from finetune.model.methods import Given
from finetune.model.tokens import enlarge
from tests.merging.conftest import TOKENS, load_base, randomize, write_llama

NF4 = FourBit(method="nf4")
NONE = NoQuantization()
METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"method": "adalora", "rank": 3, "init_rank": 5, "alpha": 64},
    "vera": {"method": "vera", "rank": 16, "d_initial": 0.5},
    "ia3": {"method": "ia3"},
    "norm": {"method": "norm"},
    "bitfit": {"method": "bitfit"},
    "tied-lora": {"method": "tied-lora", "rank": 4, "alpha": 8},
    "patterns": {"method": "lora", "rank": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\.": 6}, "alpha_pattern": {"down_proj": 32}},
    "embeddings-lora": {"method": "lora", "rank": 4, "embeddings": "lora"},
    "embeddings-full": {"method": "lora", "rank": 4, "embeddings": "full"},
}
NEW = (97, 98, 99)
WITH_TOKENS = {
    "new-tokens": {"method": "lora", "rank": 4, "embeddings": "new-tokens"},
    "new-tokens-full": {"method": "lora", "rank": 4, "embeddings": "full"},
    "new-tokens-lora": {"method": "lora", "rank": 4, "embeddings": "lora"},
}


def write_biased(directory: Path, *, tied: bool) -> Path:
    """A Llama with biases in attention and MLP, so that bitfit has something to train and ia3 something to scale."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=97,
        **sizes,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(directory)
    return directory


class Made:
    """A trained adapter on disk, and the model it belongs to."""

    def __init__(
        self, directory: Path, tuning: Tuning, quantization: Quantization, base: Path, dtype: torch.dtype, ids: tuple[int, ...]
    ) -> None:
        self.quantization, self.base, self.dtype, self.ids = quantization, base, dtype, ids
        torch.manual_seed(3)
        self.adapter = directory / "adapter"
        model = attach(self.fresh(), tuning, Given(new_ids=ids))
        randomize(model)
        self.adapter.mkdir()
        save(model, self.adapter)
        # what merging compares with: the adapter as it is read back
        self.model = load(self.fresh(), self.adapter).eval()
        self.source = MergeSource(base, self.adapter, quantization, dtype, new_ids=ids)

    def fresh(self) -> Any:
        model = load_base(self.base, self.quantization, self.dtype)
        enlarge(model, self.ids)
        return model


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(tokens).logits.float()


@torch.no_grad()
def reloaded(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def make(
    tmp_path: Path, kind: str, *, tied: bool, quantization: Quantization = NONE, dtype: torch.dtype = torch.float32, biased: bool = False
) -> Made:
    settings = {**METHODS, **WITH_TOKENS}[kind]
    tuning: Any = TypeAdapter(Tuning).validate_python(settings)
    write = write_biased if biased or kind == "bitfit" else lambda path, tied: write_llama(path, tied=tied, dtype=dtype)
    base = write(tmp_path / "base", tied=tied)
    return Made(tmp_path, tuning, quantization, base, dtype, NEW if kind in WITH_TOKENS else ())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quantization", [NONE, NF4], ids=["none", "nf4"])
@pytest.mark.parametrize("kind", [*METHODS, "ia3-biased"])
def test_m1_merged_equals_unmerged(tmp_path: Path, kind: str, quantization: Quantization, tied: bool) -> None:
    made = make(tmp_path, kind.removesuffix("-biased"), tied=tied, quantization=quantization, biased=kind.endswith("-biased"))
    fold(made.source, tmp_path / "merged", torch.float32)
    merged = reloaded(tmp_path / "merged")
    assert (logits(merged) - logits(made.model)).abs().max() < 1e-4
    with switched_off(made.model):
        # the adapter matters, else agreement would say nothing
        assert (logits(made.model) - logits(merged)).abs().max() > 0.05
    assert require_identity(made.model, tmp_path / "merged", torch.float32) < 1e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quantization", [NONE, NF4], ids=["none", "nf4"])
@pytest.mark.parametrize("kind", WITH_TOKENS)
def test_a8_new_tokens_are_in_the_merged_model(tmp_path: Path, kind: str, quantization: Quantization, tied: bool) -> None:
    made = make(tmp_path, kind, tied=tied, quantization=quantization)
    tokens = torch.randint(0, 100, (3, 16), generator=torch.Generator().manual_seed(8))
    tokens[:, ::4] = torch.tensor((*NEW, 97))
    report = fold(made.source, tmp_path / "merged", torch.float32)
    merged = reloaded(tmp_path / "merged")
    assert (logits(merged, tokens) - logits(made.model, tokens)).abs().max() < 1e-4
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == 100
    assert merged.get_input_embeddings().weight.shape[0] == merged.get_output_embeddings().weight.shape[0] == 100
    assert report.untied == (tied and kind == "new-tokens-lora")
    assert config["tie_word_embeddings"] == (tied and not report.untied)
    assert require_identity(made.model, tmp_path / "merged", torch.float32) < 1e-5


@pytest.mark.parametrize("kind", ["adalora", "vera", "ia3", "norm", "bitfit", "new-tokens"])
def test_a_bf16_base_is_merged_as_it_computed(tmp_path: Path, kind: str) -> None:
    """The weights are the live ones to fp32's precision, rounded base and all."""
    made = make(tmp_path, kind, tied=True, quantization=NF4, dtype=torch.bfloat16)
    fold(made.source, tmp_path / "merged", torch.float32)
    assert require_identity(made.model, tmp_path / "merged", torch.bfloat16) < 1e-5


@pytest.mark.parametrize("kind", ["adalora", "vera", "ia3", "norm", "bitfit", "new-tokens"])
def test_an_int8_base_is_merged_as_it_was_dequantized(tmp_path: Path, kind: str) -> None:
    """The weights, not the logits: int8 layers round their inputs too, which no merged model does."""
    made = make(tmp_path, kind, tied=False, quantization=EightBit(method="int8"))
    fold(made.source, tmp_path / "merged", torch.float32)
    assert require_identity(made.model, tmp_path / "merged", torch.float32) < 1e-5


@pytest.mark.parametrize("kind", ["ia3", "bitfit"])
@pytest.mark.usefixtures("measured_here")
def test_a_whole_merge_of_another_method_is_proven(tmp_path: Path, kind: str) -> None:
    from tests.merging.test_merge import ROWS

    made = make(tmp_path, kind, tied=True, quantization=NF4)
    report = merge(made.model, made.source, tmp_path / "merged", ROWS, MergeOptions(dtype="fp32"))
    assert report.parity.max_logit_difference < 1e-4


def test_adaloras_scale_does_not_train_on_a_bf16_base(tmp_path: Path) -> None:
    """PEFT makes the rank it divides by trainable when it raises it from bf16 to fp32, and writes it into no file."""
    base = write_llama(tmp_path / "base", tied=True, dtype=torch.bfloat16)
    tuning: Any = TypeAdapter(Tuning).validate_python(METHODS["adalora"])
    for quantization in (NONE, NF4):
        model = attach(load_base(base, quantization, torch.bfloat16), tuning)
        assert {name.split(".")[-2] for name in trainable(model)} == {"lora_A", "lora_B", "lora_E"}


def test_adalora_with_pruned_ranks_cut_off_is_merged_as_peft_loads_it(tmp_path: Path) -> None:
    """PEFT's own files hold the kept singular values alone, by the pattern in the configuration."""
    made = make(tmp_path, "adalora", tied=False)
    names = {name for name in load_file(made.adapter / "adapter_model.safetensors") if name.endswith("lora_E")}
    kept = {name: [True, False, True, index % 2 == 0, False] for index, name in enumerate(sorted(names))}
    cut(made.adapter, kept)
    live = load(made.fresh(), made.adapter).eval()
    fold(made.source, tmp_path / "merged", torch.float32)
    assert (logits(reloaded(tmp_path / "merged")) - logits(live)).abs().max() < 1e-4


def cut(adapter: Path, kept: dict[str, list[bool]]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, flags in kept.items():
        mask, module = torch.tensor(flags), name.removesuffix("lora_E")
        tensors[name] = tensors[name][mask]
        tensors[f"{module}lora_A"] = tensors[f"{module}lora_A"][mask]
        tensors[f"{module}lora_B"] = tensors[f"{module}lora_B"][:, mask].contiguous()
    save_file(tensors, path, {"format": "pt"})
    change(adapter, rank_pattern={name.removeprefix("base_model.model."): flags for name, flags in kept.items()})


def change(adapter: Path, **values: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no-projection": ("vera", {"save_projection": False}, "without its projections"),
    "vera-bias": ("vera", {"bias": "vera_only"}, "bias"),
    "vera-rank": ("vera", {"r": 4}, "rank 4"),
    "adalora-rank": ("adalora", {"init_r": 6}, "rank 6"),
    "adalora-dora": ("adalora", {"use_dora": True}, "use_dora"),
    "ia3-side": ("ia3", {"feedforward_modules": ["k_proj"]}, "feedforward_modules"),
    "ia3-fan": ("ia3", {"fan_in_fan_out": True}, "fan_in_fan_out"),
    "norm-future": ("norm", {"scale_twice": True}, "scale_twice"),
    "bitfit-future": ("bitfit", {"shift": 2}, "shift"),
    "rows-elsewhere": ("new-tokens", {"trainable_token_indices": {"model.embed_tokens": [1, 2]}}, "trainable_token_indices"),
    "rows-missing": ("patterns", {"trainable_token_indices": {"model.embed_tokens": [1]}}, "trainable_token_indices"),
    "prompts": ("norm", {"peft_type": "PREFIX_TUNING"}, "keys and values of virtual tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(tmp_path: Path, name: str) -> None:
    kind, changes, reason = REFUSED[name]
    made = make(tmp_path, kind, tied=True)
    change(made.adapter, **changes)
    with pytest.raises(VerificationError, match=reason) as caught:
        fold(made.source, tmp_path / "merged", torch.float32)
    assert all(problem.where for problem in caught.value.problems)


@pytest.mark.parametrize("kind", ["adalora", "vera", "ia3", "norm", "bitfit", "new-tokens"])
@pytest.mark.parametrize("damage", ["missing", "left-over", "shape"])
def test_a4_every_tensor_is_used_exactly_once(tmp_path: Path, kind: str, damage: str) -> None:
    made = make(tmp_path, kind, tied=True)
    path = made.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(name for name in tensors if "layers.0" in name or kind == "new-tokens")[0]
    if damage == "missing":
        if kind in ("ia3", "norm", "bitfit"):
            pytest.skip("a whole module less is another, smaller adapter: `load` notices it, before the merge")
        del tensors[name]
    elif damage == "left-over":
        tensors[name.replace("layers.0", "layers.7").replace("embed_tokens", "other_tokens").replace("q_proj", "z_proj")] = tensors[
            name
        ].clone()
    else:
        tensors[name] = torch.ones(*[2 * side for side in tensors[name].shape])
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(VerificationError):
        fold(made.source, tmp_path / "merged", torch.float32)


def test_new_rows_without_the_runs_new_tokens_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path, "new-tokens", tied=True)
    with pytest.raises(VerificationError, match="row 99"):
        fold(replace(made.source, new_ids=()), tmp_path / "merged", torch.float32)


def test_copies_of_a_tied_pair_that_differ_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path, "embeddings-full", tied=True)
    path = made.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] * 2
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(VerificationError, match="copies of the tied embedding and head differ"):
        fold(made.source, tmp_path / "merged", torch.float32)


def test_original_base_keeps_the_stored_weights(tmp_path: Path) -> None:
    made = make(tmp_path, "ia3", tied=True, quantization=NF4)
    fold(replace(made.source, base="original"), tmp_path / "merged", torch.float32)
    before, after = load_file(made.base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    scales = load_file(made.adapter / "adapter_model.safetensors")
    for name, value in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.ia3_l"
        torch.testing.assert_close(after[name], value * scales[key] if key in scales else value)
