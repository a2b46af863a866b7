"""What bitsandbytes does to weights, checked against models that transformers really loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedModel

from finetune.config.schema import EightBit, FourBit, NoQuantization, Quantization
from finetune.errors import ConfigError, VerificationError
from finetune.model import quantize

BITS = [
    FourBit(method="nf4"),
    FourBit(method="nf4", double_quant=False),
    FourBit(method="fp4"),
    EightBit(method="int8"),
]
NAMES = ["nf4-double", "nf4", "fp4", "int8"]
TOKENS = torch.arange(24).reshape(2, 12)


def load(base: Path, quantization: Quantization, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=quantize.bnb_config(quantization, dtype))
    quantize.disable_cpu_repacking(model)
    return model.eval()


def gaussian(d_out: int = 192, d_in: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quantization", BITS, ids=NAMES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_quantized_modules_are_those_of_a_loaded_model(llama: Callable[..., Path], quantization: Quantization, tied: bool) -> None:
    base = llama(tied=tied)
    loaded = {name for name, module in load(base, quantization, torch.float32).named_modules() if quantize.is_quantized(module)}
    assert quantize.quantized_modules(AutoConfig.from_pretrained(base)) == loaded
    assert len(loaded) == 2 * 7
    assert "lm_head" not in loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["from-fp32", "from-bf16"])
@pytest.mark.parametrize("quantization", BITS, ids=NAMES)
def test_roundtrip_gives_the_values_of_a_loaded_model(
    llama: Callable[..., Path], quantization: Quantization, stored: torch.dtype, dtype: torch.dtype
) -> None:
    base = llama(dtype=stored)
    weights = load_file(base / "model.safetensors")
    for name, module in load(base, quantization, dtype).named_modules():
        if quantize.is_quantized(module):
            expected = quantize.dequantized(module).to(dtype).float()
            assert torch.equal(quantize.roundtrip(weights[f"{name}.weight"], quantization, dtype), expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("quantization", BITS, ids=NAMES)
def test_roundtrip_gives_the_values_that_the_matrix_product_uses(quantization: Quantization, dtype: torch.dtype) -> None:
    weight = gaussian(64, 128)
    cls = bnb.nn.Linear8bitLt if isinstance(quantization, EightBit) else bnb.nn.Linear4bit
    keywords = {"has_fp16_weights": False} if isinstance(quantization, EightBit) else {"compute_dtype": dtype}
    module = cls(128, 64, bias=False, **keywords)
    quantize.disable_cpu_repacking(module)
    quantize.replace_weight(module, quantize.quantize_weight(weight, quantization, dtype))
    # the identity reads the weight out of the product: in training mode, since int8 rounds activations too in eval mode on a CPU
    product = module.train()(torch.eye(128, dtype=dtype)).T.float()
    torch.testing.assert_close(
        quantize.roundtrip(weight, quantization, dtype), product, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=0
    )


def test_without_quantization_a_weight_is_rounded_to_the_dtype_of_loading() -> None:
    weight = gaussian()
    assert torch.equal(quantize.roundtrip(weight, NoQuantization(), torch.float32), weight)
    assert torch.equal(quantize.roundtrip(weight, NoQuantization(), torch.bfloat16), weight.bfloat16().float())
    assert quantize.bnb_config(NoQuantization(), torch.float32) is None


def test_m6_relative_errors_of_the_formats() -> None:
    weight = gaussian(512, 512)

    def error(quantization: Quantization) -> float:
        return float((quantize.roundtrip(weight, quantization, torch.float32) - weight).norm() / weight.norm())

    nf4, plain = error(FourBit(method="nf4")), error(FourBit(method="nf4", double_quant=False))
    assert plain == pytest.approx(0.094, abs=0.002)
    assert error(FourBit(method="fp4")) == pytest.approx(0.126, abs=0.006)
    assert error(EightBit(method="int8")) < 0.01
    # double quantization adds less than 0.2 % of the error
    assert 0 <= nf4 / plain - 1 < 0.002


@pytest.mark.parametrize("quantization", BITS, ids=NAMES)
def test_a_replaced_weight_is_what_the_module_computes_with(llama: Callable[..., Path], quantization: Quantization) -> None:
    model = load(llama(), quantization, torch.float32)
    module = model.model.layers[0].mlp.up_proj
    tokens = TOKENS
    before = model(tokens).logits
    new = quantize.quantize_weight(gaussian(*quantize.dequantized(module).shape, seed=3) * 0.3, quantization, torch.float32)
    quantize.replace_weight(module, new)
    assert torch.equal(quantize.dequantized(module), new.values)
    after = model(tokens).logits
    assert (after - before).abs().max() > 0.1
    # and stays so after the forward that moves int8's scales
    assert torch.equal(quantize.dequantized(module), new.values)


def test_a_weight_of_another_shape_is_refused(llama: Callable[..., Path]) -> None:
    nf4 = FourBit(method="nf4")
    module = load(llama(), nf4, torch.float32).model.layers[0].mlp.up_proj
    with pytest.raises(VerificationError, match="cannot replace"):
        quantize.replace_weight(module, quantize.quantize_weight(gaussian(64, 128), nf4, torch.float32))
    with pytest.raises(VerificationError, match="not a quantized linear"):
        quantize.replace_weight(nn.Linear(4, 4), quantize.quantize_weight(gaussian(4, 64), nf4, torch.float32))
    with pytest.raises(VerificationError, match="two dimensions"):
        quantize.quantize_weight(torch.zeros(64), nf4, torch.float32)


def test_models_with_transposed_linears_are_refused() -> None:
    with pytest.raises(ConfigError, match="not supported"):
        quantize.quantized_modules(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))


def gradient(model: PreTrainedModel) -> torch.Tensor:
    """Gradient of the first norm's weight, through every 4-bit module."""
    weight = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    model.train()
    tokens = TOKENS
    (found,) = torch.autograd.grad(model(input_ids=tokens, labels=tokens).loss, [weight])
    return found


@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_a19_a_gradient_after_an_evaluation_equals_the_one_before(llama: Callable[..., Path], method: str) -> None:
    model = load(llama(), FourBit(method=method), torch.float32)
    before = gradient(model)
    model.eval()
    with torch.no_grad():
        model(TOKENS)
    torch.testing.assert_close(gradient(model), before, rtol=1e-6, atol=0)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="only CPUs with avx512_bf16 repack")
def test_a19_weights_that_were_repacked_are_refused(llama: Callable[..., Path]) -> None:
    nf4 = FourBit(method="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        llama(), dtype=torch.float32, quantization_config=quantize.bnb_config(nf4, torch.float32)
    ).eval()
    with torch.no_grad():
        model(TOKENS)
    with pytest.raises(VerificationError, match="repacked"):
        quantize.disable_cpu_repacking(model)
    with pytest.raises(VerificationError, match="repacked"):
        quantize.dequantized(model.model.layers[0].mlp.up_proj)


def test_a19_every_four_bit_module_is_protected(llama: Callable[..., Path]) -> None:
    nf4 = FourBit(method="nf4")
    model = AutoModelForCausalLM.from_pretrained(llama(), dtype=torch.float32, quantization_config=quantize.bnb_config(nf4, torch.float32))
    assert quantize.disable_cpu_repacking(model) == 14
    assert quantize.disable_cpu_repacking(copy.deepcopy(nn.Linear(2, 2))) == 0
