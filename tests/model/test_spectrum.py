"""Spectrum: the formula, the ranking, the cache, and the real model once. Check M7 of the methods."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ConfigError, VerificationError
from finetune.model import spectrum
from finetune.model.builtin import BUILTIN, resolve_model
from finetune.model.spectrum import measure, ratios, ratios_for, spectra
from finetune.planning.targets import chosen, kind_of, ranked


def planted(d_out: int, d_in: int, rank: int, strength: float, seed: int) -> torch.Tensor:
    """Gaussian noise of variance 1/d_in plus ``rank`` orthonormal directions of singular value ``strength``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(d_out, d_in, generator=generator) / math.sqrt(d_in)
    u = torch.linalg.qr(torch.randn(d_out, rank, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(d_in, rank, generator=generator))[0]
    return noise + strength * u @ v.T


def direct_ratio(weight: torch.Tensor) -> float:
    """The paper's ratio, written down a second time with numpy and loops."""
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    sigma = (np.percentile(values, 75) - np.percentile(values, 25)) / 1.349
    edge = sigma * (1 + (min(weight.shape) / max(weight.shape)) ** 0.5)
    signal = sum(value for value in values if value > edge)
    noise = sum(value for value in values if value <= edge)
    return float(signal / noise / max(values))


@pytest.mark.parametrize("shape", [(96, 96), (96, 160), (160, 96)])
@pytest.mark.parametrize("rank", [0, 4])
def test_m7_ratio_is_the_direct_formula(shape: tuple[int, int], rank: int) -> None:
    weight = planted(*shape, rank, 6.0, seed=rank)
    found = measure(weight)
    assert found.ratio == pytest.approx(direct_ratio(weight), rel=1e-5)
    assert found.shape == shape
    assert found.largest == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-5)


def test_m7_edge_of_a_known_spectrum() -> None:
    # singular values 1, 2, 3, 4, 5, 20 of a square matrix: quartiles 2.25 and 4.75
    found = measure(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 20.0])))
    assert found.edge == pytest.approx(2.5 / 1.349 * 2)  # 3.706
    assert (found.above, found.below, found.signals) == (pytest.approx(29.0), pytest.approx(6.0), 3)
    assert found.ratio == pytest.approx(29 / 6 / 20)


def test_m7_the_ratio_does_not_depend_on_orientation() -> None:
    weight = planted(48, 96, 3, 5.0, seed=1)
    assert measure(weight).ratio == pytest.approx(measure(weight.T).ratio, rel=1e-5)


def test_m7_what_the_ratio_does_not_see() -> None:
    """A limit of the method: at one noise level a few strong directions lower the ratio, since it is divided by the largest of them."""
    noise, signal = (measure(planted(64, 64, 3, strength, seed=0)).ratio for strength in (0.0, 5.0))
    assert signal < 0.6 * noise


def test_a_narrow_spectrum_has_no_noise_and_zeros_no_signal() -> None:
    assert measure(torch.eye(8)).ratio == math.inf
    assert measure(torch.zeros(8, 4)).ratio == 0.0


# --- choosing ------------------------------------------------------------------------------------------------------------------------


def test_layers_are_ranked_within_each_type_of_module() -> None:
    found = {"l.0.q": 1.0, "l.0.k": 30.0, "l.1.q": 3.0, "l.1.k": 10.0, "l.2.q": 2.0, "l.2.k": 20.0}
    assert ranked(found) == {"k": ["l.0.k", "l.2.k", "l.1.k"], "q": ["l.1.q", "l.2.q", "l.0.q"]}
    assert chosen(found, 0.67) == ["l.0.k", "l.1.q", "l.2.q", "l.2.k"]
    assert chosen(found, 0.01) == ["l.0.k", "l.1.q"]  # at least one of each type
    assert chosen(found, 1.0) == list(found)
    assert kind_of("model.layers.3.self_attn.q_proj") == "q_proj"


@pytest.mark.parametrize(("share", "layers", "count"), [(0.29, 100, 29), (0.5, 30, 15), (0.5, 3, 1), (0.07, 100, 7), (1.0, 7, 7)])
def test_the_share_is_cut_down_to_whole_layers_without_rounding_noise(share: float, layers: int, count: int) -> None:
    assert len(chosen({f"l.{layer}.q": float(layer) for layer in range(layers)}, share)) == count


def test_infinite_ratios_rank_first_in_the_models_order() -> None:
    found = {"l.0.q": 5.0, "l.1.q": math.inf, "l.2.q": math.inf}
    assert ranked(found)["q"] == ["l.1.q", "l.2.q", "l.0.q"]


# --- from a model's files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def planted_model(make_tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A random Llama of four layers with weights of one norm: noise, and in layers 1 and 2 fourteen directions that stand out of it."""
    directory = tmp_path / "model"
    shutil.copytree(make_tiny_model(num_hidden_layers=4, num_key_value_heads=4, intermediate_size=64), directory)
    tensors = load_file(directory / "model.safetensors")
    for number, (name, weight) in enumerate(sorted(tensors.items())):
        if name.endswith("_proj.weight"):
            strong = ".layers.1." in name or ".layers.2." in name
            drawn = planted(weight.shape[0], weight.shape[1], 14, 5.0 if strong else 0.0, number)
            tensors[name] = drawn / drawn.norm()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_every_linear_module_but_the_head_is_measured_once_and_kept(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    first = spectra(tiny_model_dir, lambda done, of: calls.append((done, of)))
    assert len(first) == 14
    assert calls[-1] == (14, 14)
    assert not any("lm_head" in name or "embed" in name for name in first)
    tensors = load_file(tiny_model_dir / "model.safetensors")
    for name, found in first.items():
        assert found == measure(tensors[f"{name}.weight"])

    def fail(_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(spectrum, "measure", fail)
    assert spectra(tiny_model_dir) == first
    assert ratios(tiny_model_dir, list(first)[:2]) == {name: first[name].ratio for name in list(first)[:2]}


def test_another_base_is_another_key(make_tiny_model: Callable[..., Path], tiny_model_dir: Path) -> None:
    assert spectra(tiny_model_dir) != spectra(make_tiny_model(seed=1))


def test_a_module_the_base_has_not_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(VerificationError, match="no linear module model"):
        ratios(tiny_model_dir, ["model.nothing"])


def test_nan_in_a_weight_is_refused_by_name_and_not_kept(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = math.nan
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    for _ in range(2):
        with pytest.raises(VerificationError, match=f"{name} holds NaN"):
            spectra(directory)


def test_a_model_transformers_does_not_know_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    (directory / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ConfigError, match="cannot build the model"):
        spectra(directory)


def test_m7_planted_layers_rank_first(planted_model: Path) -> None:
    by_kind = ranked({name: found.ratio for name, found in spectra(planted_model).items()})
    assert len(by_kind) == 7
    for names in by_kind.values():
        assert {name.split(".")[2] for name in names[:2]} == {"1", "2"}


def test_ratios_are_measured_only_where_the_targets_ask(tiny_model_dir: Path, cache: Path) -> None:
    from finetune.config.schema import Full, Ia3, Lora

    assert ratios_for(Ia3(method="ia3"), tiny_model_dir) is None
    assert ratios_for(Lora(method="lora"), tiny_model_dir) is None
    assert not cache.exists()
    for tuning in (
        Lora.model_validate({"method": "lora", "targets": {"spectrum": 0.5}}),
        Full.model_validate({"method": "full", "targets": {"spectrum": 0.5}}),
    ):
        found = ratios_for(tuning, tiny_model_dir)
        assert found is not None
        assert len(found) == 14


@pytest.mark.real
def test_m7_the_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = resolve_model(BUILTIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
        start = time.perf_counter()
        found = spectra(base)
        seconds = time.perf_counter() - start
    assert len(found) == 210
    assert all(math.isfinite(module.ratio) and module.ratio > 0 for module in found.values())
    with capsys.disabled():
        print(f"\nSpectrum of SmolLM2-135M: 210 modules in {seconds:.1f} s")
        for kind, names in sorted(ranked({name: module.ratio for name, module in found.items()}).items()):
            shown = [f"{name.split('.')[2]} ({found[name].ratio:.3f})" for name in (*names[:3], *names[-2:])]
            print(f"  {kind:<10} top {', '.join(shown[:3])}; bottom {', '.join(shown[3:])}")
