"""Checks M1 to M6 of the methods: what must come out of each start, scale and quantization, with the figures printed (`pytest -s`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.config.schema import EightBit, FourBit, LoftqInit, Lora, NoQuantization
from finetune.data.general import general_text
from finetune.model.adapters import attach, trainable
from finetune.model.builtin import BUILTIN, resolve_model
from finetune.model.drawn import apply_eva, draw_orthogonal
from finetune.model.head import target_losses
from finetune.model.load import load_base, load_tokenizer
from finetune.model.loftq import Quantizer, apply_loftq, decompose
from finetune.model.lora import ADAPTER, lora_layers
from finetune.model.pissa import apply_moved
from finetune.model.quantize import roundtrip
from finetune.model.weights import Weights

Llama = Callable[..., Path]
CPU, FP32 = torch.device("cpu"), torch.float32
NF4 = FourBit(method="nf4")
IDS = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(4))
RANKS = (4, 16, 64, 256)


def adapted(base: Path, quantization: Any = None, **settings: Any) -> tuple[Any, Lora]:
    torch.manual_seed(0)
    tuning = Lora(method="lora", **settings)
    return attach(load_base(base, quantization or NoQuantization(), FP32, CPU), tuning).eval(), tuning


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def loss(model: Any) -> Tensor:
    return target_losses(model, IDS, torch.ones_like(IDS), torch.ones_like(IDS, dtype=torch.bool)).mean()


def furthest(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


# --- M1: the start is the base; merged is unmerged -----------------------------------------------------------------------------------

STARTS: dict[str, dict[str, Any]] = {
    "default": {},
    "gaussian": {"init": {"method": "gaussian"}},
    "orthogonal": {"init": {"method": "orthogonal"}},
    "eva": {"init": {"method": "eva"}},
    "pissa": {"init": {"method": "pissa"}},
    "olora": {"init": {"method": "olora"}},
    "dora": {"dora": True},
    "rslora": {"scaling": "rslora"},
}


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("start", STARTS)
def test_m1_at_the_start_the_model_is_the_base_and_merged_is_unmerged(llama: Llama, start: str) -> None:
    base = llama()
    model, tuning = adapted(base, rank=8, alpha=16, **STARTS[start])
    match start:
        case "orthogonal":
            draw_orthogonal(model)
        case "eva":
            apply_eva(model, [(IDS, torch.ones_like(IDS))])
        case "pissa" | "olora":
            apply_moved(model, base, tuning.init)  # type: ignore[arg-type]
    pristine = logits(load_base(base, NoQuantization(), FP32, CPU))
    at_start = furthest(logits(model), pristine)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    unmerged = logits(model)
    merged = furthest(logits(model.merge_and_unload()), unmerged)
    print(f"\nM1 {start}: start against base {at_start:.1e}, merged against unmerged {merged:.1e}")
    assert at_start < 1e-4
    assert merged < 1e-4
    assert furthest(unmerged, pristine) > 0.01


@pytest.mark.usefixtures("empty_cache")
def test_m1_loftq_starts_close_to_the_original(llama: Llama) -> None:
    original = logits(load_base(llama(), NoQuantization(), FP32, CPU))
    model, tuning = adapted(llama(), NF4, rank=16, alpha=64, init=LoftqInit(method="loftq", iterations=5))
    with model.disable_adapter():
        plain = float((logits(model) - original).norm() / original.norm())
    apply_loftq(model, llama(), tuning, Quantizer(NF4, FP32))
    started = float((logits(model) - original).norm() / original.norm())
    print(f"\nM1 loftq: logits off by {started:.3f} of their norm, plain NF4 {plain:.3f}")
    assert started < 0.8 * plain


# --- M2, M3: rank, scale, and the first step -----------------------------------------------------------------------------------------


def gradient_of_b(base: Path, rank: int, scaling: Any) -> float:
    model, _ = adapted(base, rank=rank, alpha=16, scaling=scaling)
    loss(model).backward()
    squares = (layer.lora_B[ADAPTER].weight.grad.double().square().sum() for layer in lora_layers(model).values())
    return math.sqrt(sum(float(square) for square in squares))


def test_m2_the_gradient_of_b_falls_with_the_rank_for_lora_and_not_for_rslora(llama: Llama) -> None:
    lora, rslora = ([gradient_of_b(llama(), rank, scaling) for rank in RANKS] for scaling in ("lora", "rslora"))
    print(f"\nM2 ranks {RANKS}, alpha 16: LoRA {[round(norm, 4) for norm in lora]}, falls {lora[0] / lora[-1]:.2f}x;", end=" ")
    print(f"rsLoRA {[round(norm, 4) for norm in rslora]}, {max(rslora) / min(rslora) - 1:.1%} apart")
    assert lora[0] / lora[-1] == pytest.approx(8, rel=0.1)
    assert max(rslora) / min(rslora) < 1.1


def first_drop(base: Path, rank: int, scaling: Any) -> float:
    """How far the loss falls in the first step of Adam."""
    model, _ = adapted(base, rank=rank, alpha=16, scaling=scaling)
    model.double()
    before = loss(model)
    before.backward()
    # no epsilon: it would stand beside gradients that differ with the rank
    torch.optim.Adam(trainable(model).values(), lr=1e-6, eps=1e-30).step()
    return before.item() - loss(model).item()


def test_m3_the_first_adam_step_gains_the_same_at_every_rank_for_lora_and_more_for_rslora(llama: Llama) -> None:
    lora, rslora = ([first_drop(llama(), rank, scaling) for rank in RANKS] for scaling in ("lora", "rslora"))
    steps = [after / before for before, after in pairwise(rslora)]
    print(f"\nM3 ranks {RANKS}: LoRA's first drops {[f'{drop:.2e}' for drop in lora]}, {max(lora) / min(lora) - 1:.0%} apart;", end=" ")
    print(f"rsLoRA {[f'{drop:.2e}' for drop in rslora]}, x{', x'.join(f'{step:.2f}' for step in steps)} for each 4x rank")
    assert max(lora) / min(lora) < 1.25
    assert steps == pytest.approx([2, 2, 2], rel=0.15)


# --- M4: LoftQ and the scale ---------------------------------------------------------------------------------------------------------

ALPHAS = (16.0, 64.0, 128.0, 256.0)


def gaussian(d_out: int, d_in: int) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1))


def left_over(weight: Tensor, scale: float, iterations: int, *, divided: bool = True) -> float:
    """||W - Q - s B A|| / ||W - Q_1|| of rank 64; not ``divided``: with the factors of the residual itself, as if s were 1."""
    found = decompose(weight, Quantizer(NF4, FP32), 64, scale, LoftqInit(method="loftq", iterations=iterations))
    factor = scale if divided else scale * scale
    left = weight - found.quantized.values - factor * found.correction.start.b @ found.correction.start.a
    return float(left.norm() / (weight - roundtrip(weight, NF4, FP32)).norm())


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_m4_loftq_gains_the_same_at_every_scale(scaling: str) -> None:
    weight = gaussian(192, 320)
    scales = [alpha / (math.sqrt(64) if scaling == "rslora" else 64) for alpha in ALPHAS]
    once, five = ([left_over(weight, scale, iterations) for scale in scales] for iterations in (1, 5))
    print(f"\nM4 {scaling}, scales {scales}: left after 1 iteration {[round(value, 4) for value in once]}, after 5 {five[0]:.4f}")
    assert once == pytest.approx([once[0]] * 4, rel=1e-5)
    assert five == pytest.approx([five[0]] * 4, rel=1e-3)  # a rounding decides which of two grid values an entry takes
    assert five[0] < once[0] < 0.9


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_m4_what_the_uncorrected_residual_would_have_given(scaling: str) -> None:
    weight = gaussian(192, 320)
    kept = left_over(weight, 1.0, 1)
    scales = [alpha / (math.sqrt(64) if scaling == "rslora" else 64) for alpha in ALPHAS]
    found = {scale: left_over(weight, scale, 1, divided=False) for scale in scales}
    shown = {scale: round(value, 3) for scale, value in found.items()}
    print(f"\nM4 uncorrected, {scaling}: {shown}, corrected {kept:.3f} at every scale")
    for scale, value in found.items():
        # the residual's leading part enters s times: (1 - s)^2 of its energy is left beside what the rank cannot hold
        assert value == pytest.approx(math.sqrt(kept**2 + (scale - 1) ** 2 * (1 - kept**2)), rel=1e-3)
    if 2.0 in found:
        assert found[2.0] == pytest.approx(1.0, abs=1e-4)  # nothing gained
    assert left_over(weight, 4.0, 1, divided=False) > 1.5  # worse than no LoftQ at all


# --- M5: the real model --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    rows = torch.ones_like(ids, dtype=torch.bool)
    return math.exp(float(target_losses(model.eval(), ids, torch.ones_like(ids), rows).mean()))


@pytest.mark.real
@pytest.mark.slow
def test_m5_perplexity_at_the_start_lies_between_the_bases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = resolve_model(BUILTIN)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    text = load_tokenizer(base)(general_text(), add_special_tokens=False).input_ids
    ids = torch.tensor(text[:1024]).reshape(4, 256)
    found = {"fp32": perplexity(load_base(base, NoQuantization(), FP32, CPU), ids)}
    for rank in (64, 16):
        model, tuning = adapted(base, NF4, rank=rank, alpha=32, scaling="rslora", init=LoftqInit(method="loftq"))
        apply_loftq(model, base, tuning, Quantizer(NF4, FP32))
        found[f"LoftQ r{rank}"] = perplexity(model, ids)
    with model.disable_adapter():
        found["NF4"] = perplexity(model, ids)
    print(f"\nM5 perplexity of general text: { ({name: round(value, 2) for name, value in found.items()}) }")
    assert list(found) == sorted(found, key=lambda name: found[name])
    assert found["NF4"] - found["LoftQ r64"] > 0.2 * (found["NF4"] - found["fp32"])


# --- M6: what quantization costs -----------------------------------------------------------------------------------------------------


def int4(weight: Tensor, block: int = 64) -> Tensor:
    """Symmetric 4-bit integers with one scale a block, for comparison: 15 evenly spaced levels."""
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 7
    return ((blocks / scales).round() * scales).reshape(weight.shape)


def grid_errors(weights: list[Tensor], which: str) -> dict[str, float]:
    """||W - Q|| / ||W||, mean over ``weights``, by grid; printed with what double quantization adds."""

    def error(quantized: Callable[[Tensor], Tensor]) -> float:
        return sum(float((weight - quantized(weight)).norm() / weight.norm()) for weight in weights) / len(weights)

    def on_grid(quantization: Any) -> float:
        return error(lambda weight: roundtrip(weight, quantization, FP32))

    found = {"nf4": on_grid(NF4), "fp4": on_grid(FourBit(method="fp4")), "int4": error(int4), "int8": on_grid(EightBit(method="int8"))}
    single = {"nf4": FourBit(method="nf4", double_quant=False), "fp4": FourBit(method="fp4", double_quant=False)}
    added = {kind: found[kind] / on_grid(grid) - 1 for kind, grid in single.items()}
    shown = {kind: round(value, 4) for kind, value in found.items()}
    more = ", ".join(f"{value:.2%} ({kind})" for kind, value in added.items())
    print(f"\nM6 relative weight error, {which}: {shown}; double quantization adds {more}")
    assert all(abs(value) < 0.002 for value in added.values())
    return found


def test_m6_relative_weight_error_of_gaussian_weights() -> None:
    found = grid_errors([gaussian(768, 1024)], "Gaussian")
    assert found["nf4"] == pytest.approx(0.092, abs=0.001)
    assert found["int4"] == pytest.approx(0.1076, abs=0.001)
    assert found["fp4"] == pytest.approx(0.122, abs=0.001)
    assert found["int8"] < 0.01


@pytest.mark.real
def test_m6_relative_weight_error_of_the_real_model() -> None:
    with Weights.of_model(resolve_model(BUILTIN)) as weights:
        names = [name for name in weights.info if name.endswith("_proj.weight") and int(name.split(".")[2]) % 3 == 1]
        found = grid_errors([weights.read(name).float() for name in names], f"{len(names)} matrices of SmolLM2")
    assert found["nf4"] == pytest.approx(0.0937, abs=0.002)
    assert found["int4"] == pytest.approx(0.1136, abs=0.002)
    assert found["fp4"] == pytest.approx(0.1259, abs=0.002)
