"""Merged weights against the live PEFT model, feature by feature."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.config.schema import EightBit, FourBit
from finetune.errors import VerificationError
from finetune.merging.fold import fold
from finetune.model.weights import Weights

NF4, FP4, INT8 = FourBit(method="nf4"), FourBit(method="fp4"), EightBit(method="int8")
NF4_PLAIN = FourBit(method="nf4", double_quant=False)
BF16 = torch.bfloat16
Make = Callable[..., Any]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"down_proj": 32}, "use_rslora": True},
    "embeddings-lora": {"target_modules": ["q_proj", "up_proj", "embed_tokens"]},
    "embeddings-dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "embeddings-full": {"modules_to_save": ["model.embed_tokens"]},
    "head-lora": {"target_modules": ["q_proj", "lm_head"]},
    "head-full": {"modules_to_save": ["lm_head"]},
    "both-full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms-full": {"modules_to_save": ["model.norm", "post_attention_layernorm"]},
    "everything": {"target_modules": ["v_proj", "embed_tokens"], "modules_to_save": ["lm_head", "input_layernorm"], "use_dora": True},
}
UNTYING = {"embeddings-lora", "embeddings-dora", "embeddings-full", "head-lora", "head-full", "both-full", "everything"}


@torch.no_grad()
def merged_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()(tokens).logits.float()


def gap(made: Any, directory: Path) -> float:
    difference = (merged_logits(directory, made.tokens) - made.logits()).abs().max()
    with made.model.disable_adapter():
        # the adapter matters, else agreement would say nothing
        assert (made.logits() - merged_logits(directory, made.tokens)).abs().max() > 0.05
    return float(difference)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_m1_a8_merged_equals_unmerged(make: Make, tmp_path: Path, kind: str, tied: bool) -> None:
    made = make(tied=tied, lora=KINDS[kind])
    report = fold(made.source, tmp_path / "merged", torch.float32)
    assert gap(made, tmp_path / "merged") < 1e-4
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert report.untied == (tied and kind in UNTYING)
    assert config["tie_word_embeddings"] == (tied and kind not in UNTYING)
    assert config["dtype"] == "float32"


@pytest.mark.parametrize("loftq", [0, 1, 3], ids=["default", "loftq1", "loftq3"])
@pytest.mark.parametrize(
    "quantization", [NF4, FourBit(method="nf4", double_quant=False), FP4, INT8], ids=["nf4", "nf4-plain", "fp4", "int8"]
)
def test_a6_a_quantized_base_is_merged_as_it_was_trained_on(
    make: Make, tmp_path: Path, quantization: FourBit | EightBit, loftq: int
) -> None:
    made = make(tied=True, quantization=quantization, loftq=loftq, lora={"use_rslora": True})
    report = fold(made.source, tmp_path / "merged", torch.float32)
    if quantization.method == "int8":
        made.model.train()  # in eval mode int8 rounds the activations too, which no merged model does
    assert gap(made, tmp_path / "merged") < 1e-4
    assert report.dequantized == 14
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["dora", "embeddings-lora", "embeddings-full", "everything", "patterns"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a6_nf4_with_every_feature(make: Make, tmp_path: Path, kind: str, tied: bool) -> None:
    made = make(tied=tied, quantization=NF4, lora=KINDS[kind], loftq=2 if kind in ("dora", "patterns") else 0)
    fold(made.source, tmp_path / "merged", torch.float32)
    assert gap(made, tmp_path / "merged") < 1e-4


@pytest.mark.parametrize("quantization", [None, NF4, INT8], ids=["none", "nf4", "int8"])
@pytest.mark.parametrize("stored", [torch.float32, BF16], ids=["from-fp32", "from-bf16"])
def test_a_base_that_computed_in_bf16_is_rounded_as_it_was_loaded(
    make: Make, tmp_path: Path, quantization: FourBit | EightBit | None, stored: torch.dtype
) -> None:
    made = make(stored=stored, compute=BF16, **({"quantization": quantization} if quantization else {}))
    fold(made.source, tmp_path / "merged", torch.float32)
    # the oracle computes with the same weights in fp32, so that only their values are compared
    base = made.fresh_base()
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    for name, module in made.model.get_base_model().named_modules():
        if hasattr(module, "base_layer"):
            linear = base.get_submodule(name)
            value = linear.weight.float() if quantization is None else _values(linear, BF16)
            expected = value + module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
            torch.testing.assert_close(weights[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    norm = base.model.norm.weight.float()
    assert torch.equal(weights["model.norm.weight"], norm)


def _values(linear: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(linear).to(dtype).float()


def test_original_base_without_loftq_is_the_usual_merge(make: Make, tmp_path: Path) -> None:
    made = make(quantization=NF4, compute=BF16, lora=KINDS["dora"])
    fold(replace(made.source, base="original"), tmp_path / "merged", torch.float32)
    weights, original = load_file(tmp_path / "merged" / "model.safetensors"), load_file(made.source.base_dir / "model.safetensors")
    layer = made.model.get_base_model().model.layers[1].mlp.down_proj
    raw = original["model.layers.1.mlp.down_proj.weight"] + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = layer.lora_magnitude_vector["default"].weight[:, None] * raw / raw.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weights["model.layers.1.mlp.down_proj.weight"], expected)
    assert torch.equal(weights["model.norm.weight"], original["model.norm.weight"])


@pytest.mark.parametrize("iterations", [1, 3])
def test_a18_original_base_takes_loftqs_start_away(make: Make, tmp_path: Path, iterations: int) -> None:
    made = make(quantization=NF4, loftq=iterations)
    start = load_file(made.source.adapter_dir / "loftq_base.safetensors")
    fold(replace(made.source, base="original"), tmp_path / "merged", torch.float32)
    weights, original = load_file(tmp_path / "merged" / "model.safetensors"), load_file(made.source.base_dir / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    layer = made.model.get_base_model().get_submodule(name)
    moved = layer.lora_B["default"].weight @ layer.lora_A["default"].weight - start[f"{name}.start.B"] @ start[f"{name}.start.A"]
    torch.testing.assert_close(weights[f"{name}.weight"], original[f"{name}.weight"] + 2.0 * moved)
    assert (f"{name}.base.A" in start) == (iterations > 1)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
def test_the_output_has_the_type_that_was_asked_for(make: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    made = make(tied=True, stored=BF16, compute=BF16, lora=KINDS["embeddings-lora"])
    report = fold(made.source, tmp_path / "merged", dtype)
    with Weights.of_model(tmp_path / "merged") as weights:
        assert {info.dtype for info in weights.info.values()} == {dtype}
        assert report.size == sum(2 * weights.read(name).numel() for name in weights.info)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == dtype
    fold(made.source, tmp_path / "exact", torch.float32)
    fine, coarse = load_file(tmp_path / "exact" / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(fine[name].to(dtype), coarse[name]) for name in fine)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_shards_stay_as_they_are(make: Make, tmp_path: Path, tied: bool) -> None:
    made = make(tied=tied, shards=True, quantization=NF4, loftq=2, lora={"modules_to_save": ["embed_tokens"]})
    report = fold(made.source, tmp_path / "merged", torch.float32)
    with Weights.of_model(made.source.base_dir) as before, Weights.of_model(tmp_path / "merged") as after:
        assert len(before.files) > 3
        assert before.files == after.files
        placement = {name: info.file for name, info in before.info.items()}
        if tied:
            placement["lm_head.weight"] = placement["model.embed_tokens.weight"]
        assert {name: info.file for name, info in after.info.items()} == placement
        assert report.shards == len(before.files)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.size
    assert gap(made, tmp_path / "merged") < 1e-4


def test_tokenizer_and_generation_settings_travel(make: Make, tmp_path: Path) -> None:
    made = make()
    for directory, mark in ((made.source.base_dir, "base"), (made.source.adapter_dir, "adapter")):
        (directory / "tokenizer.json").write_text(mark)
    (made.source.base_dir / "merges.txt").write_text("base")
    (made.source.adapter_dir / "chat_template.jinja").write_text("adapter")
    fold(made.source, tmp_path / "merged", torch.float32)
    read = {
        path.name: path.read_text()
        for path in (tmp_path / "merged").iterdir()
        if path.suffix in (".jinja", ".txt") or path.name == "tokenizer.json"
    }
    # one set: the base's merges would belong to another vocabulary
    assert read == {"tokenizer.json": "adapter", "chat_template.jinja": "adapter"}
    assert (tmp_path / "merged" / "generation_config.json").is_file()


def test_progress_counts_every_tensor(make: Make, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = fold(make().source, tmp_path / "merged", torch.float32, lambda done, of: seen.append((done, of)))
    assert seen == [(done, report.tensors) for done in range(1, report.tensors + 1)]


def test_values_that_do_not_fit_are_refused(make: Make, tmp_path: Path) -> None:
    made = make(lora={"modules_to_save": ["model.norm"]})
    made.model.get_base_model().model.norm.modules_to_save["default"].weight.data[3] = 1e5
    made.model.save_pretrained(made.source.adapter_dir, save_embedding_layers=False)
    with pytest.raises(VerificationError, match="do not fit"):
        fold(made.source, tmp_path / "merged", torch.float16)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a8_new_tokens_in_spare_rows_of_a_head_with_a_lora(make: Make, tmp_path: Path, tied: bool) -> None:
    """The shape of the head does not tell that its rows changed."""
    made = make(tied=tied, lora=KINDS["head-lora"])
    fold(replace(made.source, new_ids=(95, 96)), tmp_path / "merged", torch.float32)
    head = made.model.get_base_model().lm_head
    expected = head.get_base_layer().weight.detach().clone()
    expected[95:] = expected[:95].double().mean(0).float()
    expected += head.get_delta_weight("default").detach()
    written = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"]
    assert (written - expected).abs().max() < 1e-5
