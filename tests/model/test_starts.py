"""Ranks by pattern, and starts other than the default: where they begin, what they do to the base, what is exported."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from finetune.config.schema import (
    EvaInit,
    FourBit,
    GaussianInit,
    Init,
    Lora,
    NoQuantization,
    OloraInit,
    OrthogonalInit,
    PissaInit,
)
from finetune.errors import ConfigError, VerificationError
from finetune.model.adapters import WEIGHTS, attach, load
from finetune.model.correction import MOVED, Factors
from finetune.model.drawn import apply_eva, draw_orthogonal
from finetune.model.load import load_base
from finetune.model.lora import ADAPTER, lora_config, lora_layers
from finetune.model.pissa import apply_moved, difference, orthonormal, principal, restore_moved, save_plain

Llama = Callable[..., Path]
CPU, FP32 = torch.device("cpu"), torch.float32
TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(4))
PISSA, OLORA = PissaInit(method="pissa"), OloraInit(method="olora")
pytestmark = pytest.mark.usefixtures("empty_cache")


def base_of(directory: Path, dtype: torch.dtype = FP32, quantization: Any = None) -> Any:
    return load_base(directory, quantization or NoQuantization(), dtype, CPU)


def attached(directory: Path, dtype: torch.dtype = FP32, quantization: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    return attach(base_of(directory, dtype, quantization), Lora(method="lora", **{"rank": 8, "alpha": 24, **settings})).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits.float()


def trained(model: Any) -> Any:
    """``model`` with every trainable value changed, as some steps would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


# --- ranks and alphas by pattern -----------------------------------------------------------------------------------------------------

PATTERNS = {
    "rank_pattern": {r"layers\.0\.self_attn": 4, "q_proj": 2, "down": 12},
    "alpha_pattern": {r"1\.mlp\.(up|gate)_proj$": 5.5, "_proj": 10.0},
}


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_the_first_pattern_that_is_found_decides_and_peft_reads_it_the_same(llama: Llama, tmp_path: Path, scaling: Any) -> None:
    model = attached(llama(), scaling=scaling, **PATTERNS)
    layers = lora_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        rank = 4 if "layers.0.self_attn" in name else 2 if "q_proj" in name else 12 if "down" in name else 8
        alpha = 5.5 if name in ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj") else 10.0
        assert layer.lora_A[ADAPTER].weight.shape[0] == layer.lora_B[ADAPTER].weight.shape[1] == rank, name
        assert layer.scaling[ADAPTER] == pytest.approx(alpha / (rank**0.5 if scaling == "rslora" else rank)), name
    trained(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(llama()), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_a_pattern_names_no_other_module_that_ends_alike(llama: Llama) -> None:
    config = lora_config(base_of(llama()), Lora(method="lora", targets=("q_proj", "k_proj"), rank_pattern={r"^model\.layers\.1\.": 4}))
    assert {re.sub(r"\\", "", name): rank for name, rank in config.rank_pattern.items()} == {
        f"model.layers.1.self_attn.{kind}_proj": 4 for kind in "qk"
    }


def test_a11_every_pattern_decides_for_a_module(llama: Llama) -> None:
    base = base_of(llama())
    for key in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ConfigError, match="no target module matches 'up_prj'") as found:
            lora_config(base, Lora(method="lora", **{key: {"up_prj": 4, "layers.9": 8}}))
        assert "up_proj" in str(found.value)
        assert "layers.9" in str(found.value)
        with pytest.raises(ConfigError, match="earlier patterns match all of its 2 modules"):
            lora_config(base, Lora(method="lora", **{key: {"_proj": 4, "q_proj": 8}}))
    with pytest.raises(ConfigError, match="no target module"):
        lora_config(base, Lora(method="lora", targets="attention", rank_pattern={"down_proj": 4}))
    with pytest.raises(ConfigError, match="no regular expression"):
        lora_config(base, Lora(method="lora", rank_pattern={"(": 4}))


def test_an_embedding_can_have_its_own_rank(llama: Llama) -> None:
    model = attached(llama(), embeddings="lora", rank_pattern={"embed_tokens": 2}, alpha_pattern={"embed_tokens": 6})
    embedding = model.get_base_model().model.embed_tokens
    assert embedding.lora_embedding_A[ADAPTER].shape[0] == 2
    assert embedding.scaling[ADAPTER] == 3.0


# --- starts that are drawn -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("quantization", [NoQuantization(), FourBit(method="nf4")], ids=["plain", "nf4"])
def test_m1_orthogonal_factors_start_at_nothing_on_every_base(llama: Llama, dtype: torch.dtype, quantization: Any) -> None:
    model = attached(llama(), dtype, quantization, init=OrthogonalInit(method="orthogonal"), rank_pattern={"v_proj": 4})
    draw_orthogonal(model)
    for layer in lora_layers(model).values():
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        assert a.dtype == b.dtype == FP32
        assert a.norm() > 0.1 and b.norm() > 0.1  # noqa: PT018
        assert (b @ a).abs().max() < 1e-6
    started = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(started, logits(model), rtol=0, atol=1e-4 if dtype == FP32 else 0.1)


def test_orthogonal_needs_an_even_rank_everywhere(llama: Llama) -> None:
    tuning = Lora(method="lora", rank=8, init=OrthogonalInit(method="orthogonal"), rank_pattern={"k_proj": 3})
    with pytest.raises(ConfigError, match=r"k_proj has 3"):
        lora_config(base_of(llama()), tuning)


def test_a13_the_seed_decides_what_is_drawn(llama: Llama) -> None:
    def drawn(seed: int, init: Init) -> Tensor:
        torch.manual_seed(seed)
        model = attach(base_of(llama()), Lora(method="lora", rank=4, init=init))
        if isinstance(init, OrthogonalInit):
            draw_orthogonal(model)
        return torch.cat([layer.lora_A[ADAPTER].weight.flatten() for layer in lora_layers(model).values()])

    for init in (GaussianInit(method="gaussian"), OrthogonalInit(method="orthogonal")):
        assert torch.equal(drawn(3, init), drawn(3, init))
        assert not torch.equal(drawn(3, init), drawn(4, init))


# --- EVA -----------------------------------------------------------------------------------------------------------------------------


def inputs_of(model: Any, name: str, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """All inputs of a module, stacked: the oracle's matrix."""
    seen: list[Tensor] = []
    module = model.get_base_model().get_submodule(name)
    with torch.no_grad():
        for ids, attention in batches:

            def look(_module: Any, args: tuple[Tensor, ...], mask: Tensor = attention) -> None:
                seen.append(args[0][mask.bool()].float())

            hook = module.register_forward_pre_hook(look)
            model(input_ids=ids, attention_mask=attention)
            hook.remove()
    return torch.cat(seen)


def batches_of(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 97, (4, 20), generator=generator)
        attention = torch.ones_like(ids)
        attention[1, 12:] = 0
        made.append((ids, attention))
    return made


def test_eva_starts_at_the_main_directions_of_the_inputs(llama: Llama) -> None:
    model = attached(llama(), init=EvaInit(method="eva"), rank_pattern={"k_proj": 3})
    batches = batches_of(6)
    apply_eva(model, batches)
    for name, layer in lora_layers(model).items():
        a = layer.lora_A[ADAPTER].weight
        assert not layer.lora_B[ADAPTER].weight.any()
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-4)
        stacked = inputs_of(model, name, batches)
        exact = torch.linalg.svd(stacked, full_matrices=False)[2][: len(a)]
        # the share of the inputs' energy that the best directions explain, and that these do
        best, found = (stacked @ exact.T).norm() ** 2, (stacked @ a.T).norm() ** 2
        assert found > 0.995 * best, name


def test_eva_leaves_mode_and_base_alone_and_is_deterministic(llama: Llama) -> None:
    first, second = attached(llama(), init=EvaInit(method="eva")), attached(llama(), init=EvaInit(method="eva"))
    first.train()
    apply_eva(first, batches_of(2))
    assert first.training
    torch.rand(3)  # what was drawn before does not matter
    apply_eva(second, batches_of(2))
    for left, right in zip(lora_layers(first).values(), lora_layers(second).values(), strict=True):
        assert torch.equal(left.lora_A[ADAPTER].weight, right.lora_A[ADAPTER].weight)
    torch.testing.assert_close(logits(first.eval()), logits(base_of(llama())), rtol=0, atol=1e-5)
    assert not [hook for module in first.modules() for hook in module._forward_pre_hooks.values() if "look" in repr(hook)]


def test_eva_with_fewer_tokens_than_the_rank_has_no_dead_row(llama: Llama) -> None:
    model = attached(llama(), init=EvaInit(method="eva"), rank=100)
    apply_eva(model, [(TOKENS[:1], torch.ones_like(TOKENS[:1]))])
    for layer in lora_layers(model).values():
        a = layer.lora_A[ADAPTER].weight
        alive = min(a.shape)
        torch.testing.assert_close(a[:alive] @ a[:alive].T, torch.eye(alive), rtol=0, atol=1e-4)


def test_eva_works_on_a_quantized_base(llama: Llama) -> None:
    model = attached(llama(), quantization=FourBit(method="nf4"), init=EvaInit(method="eva"))
    before = logits(model)
    apply_eva(model, batches_of(1))
    assert torch.equal(logits(model), before)


# --- PiSSA and OLoRA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_pissa_is_the_best_part_of_its_rank_whatever_the_scale(scale: float) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    u, sigma, v = torch.linalg.svd(weight)
    start = principal(weight, 8, scale)
    torch.testing.assert_close(scale * start.b @ start.a, u[:, :8] @ sigma[:8].diag() @ v[:8], rtol=0, atol=1e-4)
    torch.testing.assert_close(start.a.norm(dim=1), start.b.norm(dim=0))
    wide = principal(weight, 50, scale)
    torch.testing.assert_close(scale * wide.b @ wide.a, weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_olora_is_the_qr_part_whatever_the_scale(scale: float) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    q, r = torch.linalg.qr(weight)
    start = orthonormal(weight, 8, scale)
    torch.testing.assert_close(scale * start.b @ start.a, q[:, :8] @ r[:8], rtol=0, atol=1e-4)
    torch.testing.assert_close(start.b.T @ start.b, torch.eye(8), rtol=0, atol=1e-5)


def test_the_difference_keeps_what_is_small_beside_what_cancels() -> None:
    generator = torch.Generator().manual_seed(2)
    start = Factors(torch.randn(4, 40, generator=generator), torch.randn(30, 4, generator=generator), 2.0)
    change = 1e-4 * torch.randn(30, 4, generator=generator)
    plain = difference(Factors(start.a, start.b + change, 2.0), start)
    assert plain.a.shape == (8, 40)
    assert plain.b.shape == (30, 8)
    expected = (start.b + change).double() @ start.a.double() - start.b.double() @ start.a.double()
    assert (plain.b @ plain.a - expected).norm() / expected.norm() < 1e-6
    # in bf16 too, where the two parts alone would drown the change
    rounded = plain.b.bfloat16().float() @ plain.a.bfloat16().float()
    assert (rounded - expected).norm() / expected.norm() < 0.01


MOVED_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"scaling": "rslora"},
    "patterns": {"scaling": "rslora", **PATTERNS},
    "wide": {"rank": 80},
    "dora": {"dora": True},
    "embedding": {"embeddings": "lora", "scaling": "rslora", "rank_pattern": {"embed_tokens": 4}},
    "attention": {"targets": "attention", "embeddings": "full"},
}


@pytest.mark.parametrize("init", [PISSA, PissaInit(method="pissa", exact=True), OLORA], ids=["pissa", "exact", "olora"])
@pytest.mark.parametrize("settings", MOVED_SETTINGS.values(), ids=MOVED_SETTINGS)
def test_a18_the_export_is_a_plain_lora_on_the_pristine_base(llama: Llama, tmp_path: Path, init: Any, settings: dict[str, Any]) -> None:
    pristine = logits(base_of(llama()))
    model = attached(llama(), init=init, **settings)
    report = apply_moved(model, llama(), init)
    torch.testing.assert_close(logits(model), pristine, rtol=0, atol=2e-4)  # M1: the start is the base
    with model.disable_adapter():
        assert (logits(model) - pristine).abs().max() > 0.1  # what a naive export would evaluate and serve as the base
    wanted = logits(trained(model))
    assert (wanted - pristine).abs().max() > 0.1
    report.save(tmp_path)
    save_plain(model, tmp_path, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_of(llama()), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=3e-4)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), pristine)
    assert loaded.peft_config[ADAPTER].init_lora_weights is True
    assert not (tmp_path / "adapter" / MOVED).exists()


@pytest.mark.parametrize("init", [PISSA, OLORA], ids=["pissa", "olora"])
def test_d1_a_resumed_base_is_bitwise_the_one_of_the_start(llama: Llama, tmp_path: Path, init: Any) -> None:
    model = attached(llama(dtype=torch.bfloat16), torch.bfloat16, init=init, scaling="rslora")
    apply_moved(model, llama(dtype=torch.bfloat16), init).save(tmp_path)
    again = attached(llama(dtype=torch.bfloat16), torch.bfloat16, init=init, scaling="rslora")
    restore_moved(again, tmp_path)
    for name, layer in lora_layers(model).items():
        assert torch.equal(lora_layers(again)[name].get_base_layer().weight, layer.get_base_layer().weight), name


def test_what_cannot_be_moved_or_restored_is_refused(llama: Llama, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is quantized"):
        apply_moved(attached(llama(), quantization=FourBit(method="nf4")), llama(), PISSA)
    apply_moved(attached(llama(), targets=("q_proj",)), llama(), PISSA).save(tmp_path)
    with pytest.raises(VerificationError, match="not of this model's targets"):
        restore_moved(attached(llama()), tmp_path)
    with pytest.raises(VerificationError):
        restore_moved(attached(llama()), tmp_path / "nowhere")


def test_b9_what_was_exported_is_read_back(llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(llama())
    apply_moved(model, llama(), PISSA).save(tmp_path)
    monkeypatch.setattr("finetune.model.pissa.load_file", lambda path: dict(list(load_file(path).items())[1:]))
    with pytest.raises(VerificationError, match="differs from the file"):
        save_plain(model, tmp_path, tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).is_file()


@pytest.mark.parametrize("init", [PISSA, OLORA], ids=["pissa", "olora"])
def test_a18_a_whole_copy_of_tied_embeddings_is_exported_with_the_start_taken_out(llama: Llama, tmp_path: Path, init: Any) -> None:
    """The copy is the head's too: one storage under two names, which safetensors refuses."""
    base = llama(tied=True)
    model = attached(base, init=init, embeddings="full")
    apply_moved(model, base, init).save(tmp_path)
    wanted = logits(trained(model))
    save_plain(model, tmp_path, tmp_path / "adapter")
    loaded = load(base_of(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=3e-4)
