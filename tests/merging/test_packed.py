"""A base that was saved quantized: trained on and merged as it is stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.config.schema import EightBit, FourBit, LoftqInit, Lora, NoQuantization, Quantization
from finetune.errors import ConfigError, VerificationError
from finetune.merging.fold import fold
from finetune.merging.identity import require_identity
from finetune.merging.inputs import MergeSource
from finetune.model.load import load_base
from finetune.model.packed import PackedWeights, require_agreement, stored_quantization
from finetune.model.quantize import bnb_config, dequantized, is_quantized
from finetune.model.weights import Weights
from tests.merging.conftest import TOKENS, randomize, write_llama

NF4, INT8 = FourBit(method="nf4"), EightBit(method="int8")
KINDS: dict[str, Quantization] = {
    "nf4": NF4,
    "nf4-plain": FourBit(method="nf4", double_quant=False),
    "fp4": FourBit(method="fp4"),
    "int8": INT8,
}
LORA = Lora(method="lora", rank=4)
CPU = torch.device("cpu")


def write_packed(directory: Path, quantization: Quantization, dtype: torch.dtype, *, tied: bool = True) -> Path:
    """What plain transformers saves of a quantized model."""
    write_llama(directory / "original", tied=tied, dtype=torch.float32)
    settings = bnb_config(quantization, dtype)
    AutoModelForCausalLM.from_pretrained(directory / "original", dtype=dtype, quantization_config=settings).save_pretrained(
        directory / "packed"
    )
    return directory / "packed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_loaded_modules(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    packed = write_packed(tmp_path, KINDS[kind], dtype)
    assert stored_quantization(packed) == KINDS[kind]
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    for computed in (dtype, other):
        live = load_base(packed, KINDS[kind], computed, CPU)
        assert {parameter.dtype for parameter in live.parameters() if parameter.is_floating_point()} == {computed}
        _require_values(packed, live, computed)


def _require_values(packed: Path, live: Any, dtype: torch.dtype) -> None:
    with PackedWeights(packed, dtype) as weights:
        assert set(weights.info) == {name for name, _ in live.named_parameters()}
        modules = {name: module for name, module in live.named_modules() if is_quantized(module)}
        assert weights.modules == set(modules)
        for name, module in modules.items():
            assert weights.info[f"{name}.weight"].shape == (module.out_features, module.in_features)
            assert torch.equal(weights.read(f"{name}.weight"), dequantized(module).to(dtype))
        assert torch.equal(weights.read("model.norm.weight").to(dtype), live.model.norm.weight)
        # what the module computes is a product with these values
        module, inputs = modules["model.layers.1.mlp.up_proj"], torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = inputs.float() @ weights.read("model.layers.1.mlp.up_proj.weight").float().T
        module.train()  # in eval mode int8 rounds its inputs
        with torch.no_grad():
            torch.testing.assert_close(module(inputs).float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a6_a_packed_base_is_merged_as_it_was_trained_on(tmp_path: Path, kind: str, tied: bool) -> None:
    """Against PEFT on the checkpoint as plain transformers loads it."""
    packed = write_packed(tmp_path, KINDS[kind], torch.float32, tied=tied)
    model = get_peft_model(
        load_base(packed, KINDS[kind], torch.float32, CPU),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=kind != "int8"),
    )
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    if kind == "int8":
        model.train()  # in eval mode int8 rounds the activations too, which no merged model does
    source = MergeSource(packed, tmp_path / "adapter", KINDS[kind], torch.float32)
    report = fold(source, tmp_path / "merged", torch.float32)
    assert report.dequantized == 14
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected, found = model(TOKENS).logits, merged(TOKENS).logits
        with model.disable_adapter():
            assert (model(TOKENS).logits - found).abs().max() > 0.05
    assert (expected - found).abs().max() < 1e-4
    assert require_identity(model, tmp_path / "merged", torch.float32) < 1e-6
    with pytest.raises(ConfigError, match="original base is not on this machine"):
        fold(replace(source, base="original"), tmp_path / "other", torch.float32)


def test_a_run_says_what_its_checkpoint_is(tmp_path: Path) -> None:
    packed = write_packed(tmp_path, NF4, torch.bfloat16)
    require_agreement(packed, NF4, LORA)
    require_agreement(packed, FourBit(method="nf4", compute_dtype="fp32"), LORA)
    require_agreement(tmp_path / "original", NoQuantization(), LORA)
    for other in (NoQuantization(), INT8, FourBit(method="fp4"), FourBit(method="nf4", double_quant=False)):
        with pytest.raises(ConfigError, match="quantized already as") as caught:
            require_agreement(packed, other, LORA)
        assert "{method: nf4, double_quant: true}" in caught.value.problems[0].fix
    with pytest.raises(ConfigError, match="LoftQ"):
        require_agreement(packed, NF4, Lora(method="lora", init=LoftqInit(method="loftq")))
    with pytest.raises(VerificationError, match="before that are needed"):
        Weights.of_model(packed)


def test_another_librarys_format_is_refused(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", tied=True, dtype=torch.float32)
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ConfigError, match="gptq"):
        load_base(base, NoQuantization(), torch.float32, CPU)


@pytest.mark.parametrize("damage", ["no-constants", "no-absmax", "left-over", "none-quantized"])
def test_damaged_constants_are_refused(tmp_path: Path, damage: str) -> None:
    packed = write_packed(tmp_path, NF4, torch.bfloat16)
    path = packed / "model.safetensors"
    tensors: dict[str, Any] = load_file(path)
    weight = "model.layers.0.mlp.up_proj.weight"
    if damage == "no-constants":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{weight}.")}
    elif damage == "no-absmax":
        del tensors[f"{weight}.absmax"]
    elif damage == "left-over":
        del tensors[weight]
    else:
        tensors = load_file(tmp_path / "original" / "model.safetensors")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(VerificationError), PackedWeights(packed) as weights:
        weights.read(weight)


@pytest.mark.usefixtures("measured_here")
def test_a_run_on_a_packed_base_is_trained_merged_and_verified(
    write_config: Any, train_here: Any, tmp_path: Path, tiny_model_dir: Path
) -> None:
    from finetune import api

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16, quantization_config=bnb_config(NF4, torch.bfloat16))
    model.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_model_dir / name).is_file():
            (tmp_path / "packed" / name).write_bytes((tiny_model_dir / name).read_bytes())
    with pytest.raises(ConfigError, match="quantized already as"):
        train_here(write_config(model={"id": str(tmp_path / "packed")}))
    run = train_here(
        write_config(model={"id": str(tmp_path / "packed")}, quantization={"method": "nf4"}, output=str(tmp_path / "packed-run"))
    )
    report = api.merge(run, tmp_path / "merged", dtype="fp32")
    assert report.parity.max_logit_difference < 1e-4
    assert report.trials[0].identity is not None
    assert report.trials[0].identity < 1e-6
    exported = api.export(run, tmp_path / "again", "nf4")
    assert [trial.details["merged_onto"] for trial in exported.trials] == ["dequantized"]
