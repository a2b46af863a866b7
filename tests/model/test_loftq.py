"""LoftQ against the paper's algorithm, and what it must do for the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.config.schema import EightBit, FourBit, LoftqInit, Lora, NoQuantization
from finetune.errors import ConfigError, VerificationError
from finetune.model.computed_start import StartReport
from finetune.model.correction import Corrections
from finetune.model.loftq import Quantizer, apply_loftq, decompose, restore_base, save_base_correction
from finetune.model.lora import lora_layers
from finetune.model.low_rank import low_rank
from finetune.model.quantize import bnb_config, dequantized, disable_cpu_repacking, is_quantized, roundtrip
from finetune.model.start import before_training
from finetune.model.weights import Weights

NF4, FP4, INT8 = FourBit(method="nf4"), FourBit(method="fp4"), EightBit(method="int8")
FP32 = torch.float32
TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(4))
Llama = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("empty_cache")


def loftq(iterations: int = 1, **settings: Any) -> LoftqInit:
    return LoftqInit(method="loftq", iterations=iterations, **settings)


def gaussian(d_out: int, d_in: int) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1))


def by_the_paper(weight: torch.Tensor, rank: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1 of 2310.08659 with NF4, written down again: returns Q_T and A_T B_T^T."""
    update = torch.zeros_like(weight)
    for _ in range(iterations):
        quantized = dequantize_4bit(*quantize_4bit(weight - update, quant_type="nf4", compress_statistics=True))
        u, sigma, v = torch.linalg.svd(weight - quantized)
        update = u[:, :rank] @ torch.diag(sigma[:rank]) @ v[:rank]
    return quantized, update


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("iterations", [1, 3])
def test_it_is_the_papers_algorithm_whatever_the_scale(scale: float, iterations: int) -> None:
    weight = gaussian(96, 128)
    quantized, update = by_the_paper(weight, 8, iterations)
    found = decompose(weight, Quantizer(NF4, FP32), 8, scale, loftq(iterations))
    start = found.correction.start
    torch.testing.assert_close(found.quantized.values, quantized, rtol=0, atol=1e-5)
    torch.testing.assert_close(scale * start.b @ start.a, update, rtol=0, atol=1e-4)
    assert found.after == pytest.approx(float((weight - quantized - update).norm() / weight.norm()), rel=1e-4)
    assert (found.correction.base is None) == (iterations == 1)


def ratio(weight: torch.Tensor, scale: float, *, divided: bool = True) -> float:
    """||W - Q - s B A|| / ||W - Q||, with or without dividing the factors by s."""
    found = decompose(weight, Quantizer(NF4, FP32), 16, scale, loftq())
    residual = weight - found.quantized.values
    factor = scale if divided else scale * scale
    return float((residual - factor * found.correction.start.b @ found.correction.start.a).norm() / residual.norm())


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_m4_the_gain_is_the_same_for_every_scale(scaling: str) -> None:
    weight = gaussian(128, 192)
    scales = [alpha / (math.sqrt(16) if scaling == "rslora" else 16) for alpha in (4, 16, 32, 64)]
    ratios = [ratio(weight, scale) for scale in scales]
    assert ratios == pytest.approx([ratios[0]] * 4, rel=1e-5)
    assert ratios[0] < 0.9


def test_m4_what_the_uncorrected_residual_would_give() -> None:
    weight = gaussian(128, 192)
    kept = ratio(weight, 1.0)
    assert ratio(weight, 2.0, divided=False) == pytest.approx(1.0, abs=1e-5)
    assert ratio(weight, 4.0, divided=False) == pytest.approx(math.sqrt(kept**2 + 9 * (1 - kept**2)), rel=1e-4)
    assert ratio(weight, 4.0, divided=False) > 1.5


@pytest.mark.parametrize("quantization", [NF4, FP4, INT8], ids=["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_m4_more_iterations_leave_less_error(quantization: FourBit | EightBit, dtype: torch.dtype) -> None:
    errors = [decompose(gaussian(128, 128), Quantizer(quantization, dtype), 32, 2.0, loftq(iterations)) for iterations in (1, 5)]
    assert errors[1].after < errors[0].after < errors[0].before
    assert errors[1].before == errors[0].before


def test_the_factors_share_the_singular_values() -> None:
    b, a = low_rank(gaussian(40, 60), 8)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))
    torch.testing.assert_close(b.T @ b, torch.diag((b.T @ b).diag()), atol=1e-4, rtol=0)


def test_a_rank_above_the_matrix_is_filled_with_zeros() -> None:
    matrix = gaussian(24, 40)
    b, a = low_rank(matrix, 100)
    assert (b.shape, a.shape) == ((24, 100), (100, 40))
    torch.testing.assert_close(b @ a, matrix, atol=1e-4, rtol=0)
    assert not b[:, 24:].any()
    assert not a[24:].any()


def test_the_randomized_svd_is_nearly_exact_seeded_and_leaves_the_global_state_alone() -> None:
    weight = gaussian(320, 512)
    residual = weight - decompose(weight, Quantizer(NF4, FP32), 1, 1.0, loftq()).quantized.values
    state = torch.get_rng_state()
    b, a = low_rank(residual, 16)
    assert torch.equal(torch.get_rng_state(), state)
    again = low_rank(residual, 16)
    assert torch.equal(b, again[0])
    exact_b, exact_a = low_rank(residual, 16, exact=True)
    assert not torch.equal(a, exact_a)
    assert (residual - b @ a).norm() / (residual - exact_b @ exact_a).norm() < 1.006


# --- on a model --------------------------------------------------------------------------------------------------------------------------


def base_of(directory: Path, quantization: Any, dtype: torch.dtype = FP32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=bnb_config(quantization, dtype))
    disable_cpu_repacking(model)
    return model.eval()


def adapted(directory: Path, quantization: Any, iterations: int, **settings: Any) -> tuple[Any, StartReport]:
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 16, "lora_alpha": 64, "target_modules": "all-linear", **settings})
    model = get_peft_model(base_of(directory, quantization), config).eval()
    tuning = Lora(method="lora", rank=16, init=LoftqInit(method="loftq", iterations=iterations))
    return model, apply_loftq(model, directory, tuning, Quantizer(quantization, FP32))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_m1_m5_the_start_is_close_to_the_original_model(llama: Llama, rslora: bool) -> None:
    original = logits(base_of(llama(), NoQuantization()))
    model, report = adapted(llama(), NF4, 1, use_rslora=rslora)
    started = (logits(model) - original).norm()
    with model.disable_adapter():
        plain = (logits(model) - original).norm()
    better = (logits(adapted(llama(), NF4, 5, use_rslora=rslora)[0]) - original).norm()
    assert better < started < 0.9 * plain
    assert set(report.layers) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for error in report.layers.values():
        assert error.after < 0.9 * error.before
        assert error.modules == 2
    assert report.layers["up_proj"].before == pytest.approx(0.094, abs=0.005)


@pytest.mark.parametrize("iterations", [1, 3])
def test_doras_magnitude_goes_with_the_start(llama: Llama, iterations: int) -> None:
    plain, _ = adapted(llama(), NF4, iterations)
    dora, _ = adapted(llama(), NF4, iterations, use_dora=True)
    # m = ||Q + sBA|| makes DoRA's start the weight itself
    torch.testing.assert_close(logits(dora), logits(plain), rtol=0, atol=1e-4)


def test_embeddings_keep_their_start(llama: Llama) -> None:
    model, report = adapted(llama(tied=True), NF4, 2, target_modules=["q_proj", "embed_tokens"])
    with Corrections(report.directory) as corrections:
        assert corrections.modules == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    embedding = model.get_base_model().model.embed_tokens
    assert not embedding.get_delta_weight("default").any()


def test_ranks_above_the_matrix_save_and_reload(llama: Llama, tmp_path: Path) -> None:
    model, report = adapted(llama(), NF4, 2, r=80)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    save_base_correction(tmp_path, report)
    loaded = PeftModel.from_pretrained(base_of(llama(), NF4), tmp_path).eval()
    restore_base(loaded, tmp_path, llama(), NF4, FP32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantization", [NF4, FP4, INT8], ids=["nf4", "fp4", "int8"])
@pytest.mark.parametrize("before", [True, False], ids=["base-first", "adapter-first"])
def test_a6_the_base_is_restored_exactly(llama: Llama, tmp_path: Path, quantization: Any, before: bool) -> None:
    model, report = adapted(llama(), quantization, 3)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    save_base_correction(tmp_path, report)
    base = base_of(llama(), quantization)
    if before:
        assert restore_base(base, tmp_path, llama(), quantization, FP32) == 14
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    if not before:
        assert (logits(loaded) - logits(model)).abs().max() > 1e-4
        assert restore_base(loaded, tmp_path, llama(), quantization, FP32) == 14
    for name, module in model.get_base_model().named_modules():
        if is_quantized(module):
            assert torch.equal(dequantized(loaded.get_base_model().get_submodule(name)), dequantized(module)), name
    assert torch.equal(logits(loaded), logits(model))


def test_after_one_iteration_the_base_is_the_plain_quantization(llama: Llama, tmp_path: Path) -> None:
    model, report = adapted(llama(), NF4, 1)
    save_base_correction(tmp_path, report)
    assert restore_base(base_of(llama(), NF4), tmp_path, llama(), NF4, FP32) == 0
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_of(llama(), NF4)))
    with Corrections(tmp_path) as corrections:
        start = corrections.read("model.layers.0.mlp.up_proj").start
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        assert torch.equal(start.a, layer.lora_A["default"].weight)
        assert start.scale == layer.scaling["default"] == 4.0


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a18_before_training_is_the_start_and_not_the_bare_base(llama: Llama, tmp_path: Path, dora: bool) -> None:
    model, report = adapted(llama(), NF4, 2, use_dora=dora, modules_to_save=["embed_tokens"])
    save_base_correction(tmp_path, report)
    start, flags = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    trained = logits(model)
    with before_training(model, tmp_path, loftq=True):
        torch.testing.assert_close(logits(model), start, rtol=0, atol=1e-5)
    assert torch.equal(logits(model), trained)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    with before_training(model, tmp_path, loftq=False):
        assert (logits(model) - start).abs().max() > 1e-3


def test_what_cannot_be_done_is_refused(llama: Llama, tmp_path: Path) -> None:
    loftq = Lora(method="lora", init=LoftqInit(method="loftq"))
    plain = get_peft_model(base_of(llama(), NoQuantization()), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="none of the targets is quantized"):
        apply_loftq(plain, llama(), loftq, Quantizer(NF4, FP32))
    with pytest.raises(ConfigError, match="without its section"):
        apply_loftq(plain, llama(), Lora(method="lora"), Quantizer(NF4, FP32))
    model, report = adapted(llama(), NF4, 2)
    with pytest.raises(VerificationError, match="loftq_base"):
        restore_base(model, tmp_path, llama(), NF4, FP32)
    path = save_base_correction(tmp_path, report)
    with pytest.raises(VerificationError, match="needs a quantized base"):
        restore_base(base_of(llama(), NoQuantization()), tmp_path, llama(), NoQuantization(), FP32)
    assert len(load_file(path)) == 14 * 4


@pytest.mark.parametrize("quantization", [NF4, FourBit(method="nf4", double_quant=False), FP4, INT8], ids=["nf4", "single", "fp4", "int8"])
def test_each_module_has_its_own_rank_and_scale(llama: Llama, quantization: Any) -> None:
    patterns = {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 80}, "alpha_pattern": {"v_proj": 3}}
    model, report = adapted(llama(), quantization, 2, **patterns)
    with Corrections(report.directory) as corrections:
        for name, rank, scale in (("self_attn.q_proj", 4, 16.0), ("mlp.down_proj", 80, 0.8), ("self_attn.v_proj", 16, 3 / 16)):
            start = corrections.read(f"model.layers.1.{name}").start
            assert (start.a.shape[0], start.b.shape[1], start.scale) == (rank, rank, pytest.approx(scale))
    for name, layer in lora_layers(model).items():
        with Weights.of_model(llama()) as weights:
            original = weights.read(f"{name}.weight").float()
        left = (original - dequantized(layer.get_base_layer()) - layer.get_delta_weight("default")).norm() / original.norm()
        plain = (original - roundtrip(original, quantization, FP32)).norm() / original.norm()
        assert left < 0.98 * plain, name


def test_a_second_start_reads_the_factors_of_the_first(llama: Llama, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, report = adapted(llama(), NF4, 2)
    assert report.directory.parent == empty_cache / "loftq"
    monkeypatch.setattr("finetune.model.loftq.low_rank", lambda *_args, **_options: pytest.fail("computed again"))
    second, again = adapted(llama(), NF4, 2)
    assert again == report
    assert torch.equal(logits(first), logits(second))


def test_the_key_of_the_cache_holds_all_that_the_factors_depend_on(llama: Llama, make_tiny_model: Callable[..., Path]) -> None:
    seen = {adapted(llama(), NF4, 1)[1].directory}

    def started(base: Path, quantization: Any, init: LoftqInit, dtype: torch.dtype = FP32, **settings: Any) -> None:
        torch.manual_seed(0)
        options = {"r": 16, "lora_alpha": 64, "target_modules": "all-linear", **settings}
        model = get_peft_model(base_of(base, quantization, dtype), LoraConfig(task_type="CAUSAL_LM", **options))
        directory = apply_loftq(model, base, Lora(method="lora", init=init), Quantizer(quantization, dtype)).directory
        assert directory not in seen
        seen.add(directory)

    started(llama(), FP4, loftq())
    started(llama(), INT8, loftq())
    started(llama(), FourBit(method="nf4", double_quant=False), loftq())
    started(llama(), NF4, loftq(2))
    started(llama(), NF4, loftq(exact=True))
    started(llama(), NF4, loftq(), torch.bfloat16)
    started(llama(), NF4, loftq(), r=8)
    started(llama(), NF4, loftq(), lora_alpha=32)
    started(llama(), NF4, loftq(), use_rslora=True)
    started(llama(), NF4, loftq(), target_modules=["q_proj"])
    started(llama(), NF4, loftq(), alpha_pattern={"q_proj": 1})
    started(llama(dtype=torch.bfloat16), NF4, loftq())
    started(make_tiny_model(seed=5), NF4, loftq())


def test_exact_is_never_worse_than_randomized() -> None:
    weight = gaussian(320, 512)
    found = [decompose(weight, Quantizer(NF4, FP32), 16, 2.0, loftq(exact=exact)) for exact in (True, False)]
    assert found[0].after < found[1].after < 1.006 * found[0].after


def test_progress_counts_modules(llama: Llama) -> None:
    seen: list[tuple[int, int]] = []
    model = get_peft_model(base_of(llama(), NF4), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tuning = Lora(method="lora", init=LoftqInit(method="loftq"))
    apply_loftq(model, llama(), tuning, Quantizer(NF4, FP32), lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]
