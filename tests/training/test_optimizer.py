"""Every optimizer against an independent formula, resumed bitwise from a checkpoint, and the schedule."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.config.load import load_config
from finetune.config.schema import Optimizer, Schedule
from finetune.errors import ConfigError, HardwareError
from finetune.planning.groups import assign_groups
from finetune.planning.steps import Steps
from finetune.training.checkpoints import load_optimizer_state, optimizer_state
from finetune.training.optimizer import build_optimizer, rate_factor, set_rates

METHODS = ["adamw", "adamw-8bit", "paged-adamw-8bit", "paged-adamw-32bit", "adafactor", "lion", "lion-8bit", "muon", "galore"]
NAMES = {
    # 4,096 elements and more have 8-bit states
    "model.layers.0.mlp.up_proj.weight": (96, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.layers.0.self_attn.q_proj.weight": (48, 16),
    "model.embed_tokens.weight": (80, 64),
    "model.norm.weight": (64,),
}


def settings(method: str, **changes: object) -> Optimizer:
    galore = {"galore": {"rank": 8, "every_steps": 3}} if method == "galore" else {}
    return Optimizer.model_validate({"method": method, "learning_rate": 0.01, "weight_decay": 0.1, **galore, **changes})


def start(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in NAMES.items()}


def built(parameters: dict[str, torch.nn.Parameter], stated: Optimizer) -> torch.optim.Optimizer:
    return build_optimizer(parameters, assign_groups(parameters, stated), stated)


def advance(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], steps: range) -> None:
    """Steps whose gradients depend on the weights and on the step, as in training."""
    for step in steps:
        set_rates(optimizer, 1.0 / (step + 1))
        for number, parameter in enumerate(parameters.values()):
            parameter.grad = torch.sin(parameter.detach() * (step + 1) + number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_d1_a_resumed_optimizer_is_bitwise_the_uninterrupted_one(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Seven steps, and three, a file, four: every state is in the file, in the weights' type or in 8 bits."""
    whole, first = start(dtype), start(dtype)
    advance(built(whole, settings(method)), whole, range(7))
    stopped = built(first, settings(method))
    advance(stopped, first, range(3))
    tensors, scalars = optimizer_state(stopped, first)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    second = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    resumed = built(second, settings(method))
    load_optimizer_state(resumed, second, load_file(tmp_path / "optimizer.safetensors"), scalars)
    advance(resumed, second, range(3, 7))
    for name in NAMES:
        assert torch.equal(second[name], whole[name]), name
        assert not torch.equal(second[name], first[name]), name
    if "8bit" in method:
        assert tensors["model.embed_tokens.weight/state1"].dtype == torch.uint8
    elif method != "paged-adamw-32bit":
        assert {value.dtype for key, value in tensors.items() if not key.endswith("/step")} == {dtype}


# --- first steps, by formulas of their own ------------------------------------------------------------------------------------------------


def adamw(weight: Tensor, gradient: Tensor) -> Tensor:
    """After one step both moments are the gradient itself, once corrected for their start at zero."""
    return weight * (1 - 0.01 * 0.1) - 0.01 * gradient / (gradient.abs() + 1e-8)


def lion(weight: Tensor, gradient: Tensor) -> Tensor:
    return weight * (1 - 0.01 * 0.1) - 0.01 * torch.sign(gradient)


def adafactor(weight: Tensor, gradient: Tensor) -> Tensor:
    """Shazeer & Stern (1804.04235), algorithm 4 at t = 1, where the decay of the second moment is zero, with an absolute rate."""
    square = gradient.square()
    rows, columns = square.mean(1), square.mean(0)
    update = gradient / torch.sqrt(torch.outer(rows, columns) / rows.mean())
    rms = update.square().mean().sqrt()
    size = max(1.0, float(weight.square().mean().sqrt()))
    return weight * (1 - 0.01 * 0.1) - 0.01 * size * update / max(1.0, float(rms))


def muon(weight: Tensor, gradient: Tensor) -> Tensor:
    """The polynomial of the orthogonalization acts on the singular values alone; Nesterov's momentum only scales the first gradient."""
    u, s, vt = torch.linalg.svd(gradient, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return weight * (1 - 0.01 * 0.1) - 0.01 * 0.2 * max(weight.shape) ** 0.5 * (u * s) @ vt


@pytest.mark.parametrize(
    ("method", "formula", "tolerance"),
    # torch's Muon orthogonalizes in bf16
    [("adamw", adamw, 1e-6), ("lion", lion, 1e-6), ("adafactor", adafactor, 1e-5), ("muon", muon, 2e-3)],
)
def test_the_first_step_follows_the_formula(method: str, formula: Any, tolerance: float) -> None:
    parameters, name = start(), "model.layers.0.mlp.up_proj.weight"
    before = parameters[name].detach().double()
    optimizer = built(parameters, settings(method))
    gradient = torch.randn(before.shape, generator=torch.Generator().manual_seed(7))
    parameters[name].grad = gradient.clone()
    set_rates(optimizer, 1.0)
    optimizer.step()
    expected = formula(before, gradient.double())
    assert (parameters[name].detach().double() - expected).abs().max() < tolerance
    assert (expected - before).abs().max() > 5e-3


def test_adafactor_moves_a_zero_b_as_far_as_its_rate() -> None:
    parameters = {"q_proj.lora_B.default.weight": torch.nn.Parameter(torch.zeros(16, 4))}
    optimizer = built(parameters, settings("adafactor", weight_decay=0.0))
    parameters["q_proj.lora_B.default.weight"].grad = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    moved = parameters["q_proj.lora_B.default.weight"].detach().square().mean().sqrt()
    assert moved == pytest.approx(0.01, rel=0.05)


def test_muon_leaves_embeddings_and_vectors_to_adamw() -> None:
    one, other = start(), start()
    advance(built(one, settings("muon")), one, range(2))
    advance(built(other, settings("adamw")), other, range(2))
    same = {name for name in NAMES if torch.equal(one[name], other[name])}
    assert same == {"model.embed_tokens.weight", "model.norm.weight"}


def test_muon_with_nothing_to_orthogonalize_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no hidden matrix"):
        assign_groups({"model.norm.weight": torch.nn.Parameter(torch.ones(4))}, settings("muon"))


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_reaches_the_update(method: str) -> None:
    """beta1, beta2, epsilon and each group's rate and decay change what an optimizer does, where it has them."""

    def after(**changes: object) -> Tensor:
        parameters = start()
        advance(built(parameters, settings(method, **changes)), parameters, range(4))
        return torch.cat([parameter.detach().flatten() for parameter in parameters.values()])

    plain = after()
    unused = {"adafactor": {"beta1", "beta2", "epsilon"}, "lion": {"epsilon"}, "lion-8bit": {"epsilon"}}.get(method, set())
    for key, value in {"beta1": 0.5, "beta2": 0.5, "epsilon": 0.1, "weight_decay": 0.9, "learning_rate": 0.02}.items():
        assert torch.equal(after(**{key: value}), plain) == (key in unused), key
    assert not torch.equal(after(groups={"mlp": {"lr_ratio": 0.5}}), plain)
    assert not torch.equal(after(groups={"norms": {"weight_decay": 0.5}}), plain)


def test_without_bitsandbytes_the_error_names_another_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for method, alternative in {"paged-adamw-8bit": "use adamw", "lion-8bit": "use lion"}.items():
        with pytest.raises(HardwareError, match="does not run on this device") as caught:
            built(start(), settings(method))
        assert alternative in caught.value.problems[0].fix


def test_a_device_without_the_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def __init__(self, *_: object, **__: object) -> None:
            raise NotImplementedError("no kernel for this device")

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=Missing)))
    with pytest.raises(HardwareError, match="no kernel for this device"):
        built(start(), settings("adamw-8bit"))


# --- the schedule -------------------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(1, 200), st.integers(0, 50))
def test_the_schedule_rises_then_falls_inside_its_bounds(method: str, total: int, warmup: int) -> None:
    schedule = Schedule.model_validate({"method": method, "min_lr_ratio": 0.1})
    steps = Steps(per_epoch=total, total=total, warmup=min(warmup, total))
    factors = [rate_factor(schedule, steps, step) for step in range(total)]
    assert all(0 < factor <= 1.0 + 1e-12 for factor in factors)
    rising, falling = factors[: steps.warmup], factors[steps.warmup :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


def test_the_cosine_agrees_with_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup

    schedule, steps = Schedule(), Steps(per_epoch=40, total=40, warmup=5)
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(dummy, 5, 40)
    for step in range(40):
        # transformers' warm-up starts with a step of rate zero; ours with the first positive one
        wanted = dummy.param_groups[0]["lr"] if step >= 5 else (step + 1) / 5
        assert rate_factor(schedule, steps, step) == pytest.approx(wanted, abs=1e-12)
        dummy.step()
        theirs.step()


@pytest.mark.parametrize("method", ["prompt", "prefix", "norm"])
def test_muon_is_refused_before_loading_where_nothing_but_embeddings_or_vectors_train(
    write_config: Callable[..., Path], method: str
) -> None:
    with pytest.raises(ConfigError, match=f"`tuning.method: {method}` trains"):
        load_config(write_config(tuning={"method": method}, optimizer={"method": "muon"}))
