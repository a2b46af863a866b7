"""GaLore: its arithmetic, its subspace, its size (M8), and that a resumed run is the run."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from finetune.config.schema import Optimizer
from finetune.errors import ConfigError
from finetune.planning.groups import assign_groups
from finetune.training.galore import GaLore, project, project_back, subspace
from finetune.training.optimizer import build_optimizer

SMOLLM2_LAYER = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def settings(**changes: object) -> Optimizer:
    return Optimizer.model_validate({"method": "galore", "learning_rate": 0.1, "weight_decay": 0.1, **changes})


def matrix(rows: int, columns: int, seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def states_of(optimizer: torch.optim.Optimizer, *, with_step: bool = False) -> int:
    states = (state for state in optimizer.state.values())
    return sum(value.numel() for state in states for key, value in state.items() if torch.is_tensor(value) and (with_step or key != "step"))


@pytest.mark.parametrize(("method", "floats"), [("galore", 65_617_920), ("adamw", 212_336_640)])
def test_m8_the_state_of_rank_128_on_smollm2(method: str, floats: int) -> None:
    """The states that the optimizers really make, on the meta device: 65.6M against 212.3M floats for the linear weights."""
    with torch.device("meta"):
        parameters = {
            f"model.layers.{layer}.{name}.weight": torch.nn.Parameter(torch.empty(shape))
            for layer in range(30)
            for name, shape in SMOLLM2_LAYER.items()
        }
        for parameter in parameters.values():
            parameter.grad = torch.empty_like(parameter)
        stated = settings(method=method)
        optimizer = build_optimizer(parameters, assign_groups(parameters, stated), stated)
        optimizer.step()
    assert states_of(optimizer) == floats
    per_matrix = {name: min(shape) * 128 + 2 * 128 * max(shape) for name, shape in SMOLLM2_LAYER.items()}
    assert 30 * sum(per_matrix.values()) == 65_617_920


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_the_first_step_follows_the_paper(shape: tuple[int, int]) -> None:
    weight, gradient = matrix(*shape), matrix(*shape, seed=1).detach()
    before = weight.detach().double()
    weight.grad = gradient.clone()
    GaLore([{"params": [weight], "lr": 0.1, "weight_decay": 0.5}], betas=(0.9, 0.999), eps=1e-8, rank=3, every_steps=5, scale=0.25).step()
    # independent: P from the SVD of the paper, and after one step Adam's direction is R / (|R| + eps)
    g = gradient.double() if shape[0] <= shape[1] else gradient.double().T
    vectors = torch.linalg.svd(g).U[:, :3]
    seen = vectors.T @ g
    update = vectors @ (seen / (seen.abs() + 1e-8))
    update = update if shape[0] <= shape[1] else update.T
    torch.testing.assert_close(weight.detach().double(), before * (1 - 0.1 * 0.5) - 0.1 * 0.25 * update, atol=1e-5, rtol=1e-5)


def test_full_rank_and_scale_one_is_adamw_in_rotated_axes() -> None:
    """With every direction kept nothing is lost: the projected gradient comes back whole."""
    gradient = matrix(5, 8)
    projector = subspace(gradient.detach(), 5)
    torch.testing.assert_close(projector.T @ projector, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(project_back(project(gradient, projector), projector, gradient), gradient, atol=1e-5, rtol=1e-5)


def test_a_matrix_that_rank_does_not_cut_is_adamws() -> None:
    """Full rank and scale 1: bitwise AdamW, since rotating the gradient would save nothing."""
    results = []
    for method in ("galore", "adamw"):
        small, large = matrix(4, 6), matrix(16, 12, seed=2)
        parameters = {"layers.0.mlp.up_proj.weight": small, "layers.0.mlp.down_proj.weight": large}
        stated = settings(method=method, **({"galore": {"rank": 4, "scale": 1.0}} if method == "galore" else {}))
        groups = assign_groups(parameters, stated)
        optimizer = build_optimizer(parameters, groups, stated)
        for _ in range(3):
            for parameter in parameters.values():
                parameter.grad = torch.sin(parameter.detach())
            optimizer.step()
        results.append((small.detach(), large.detach(), [group.name for group in groups]))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.allclose(results[0][1], results[1][1])
    assert results[0][2] == ["(rest)", "(rest), AdamW"]


def test_with_an_identity_for_projector_every_step_is_adamw() -> None:
    """The arithmetic after projection, over several steps: a diagonal gradient has the axes for singular vectors."""
    diagonal = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0]))
    ours, theirs = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    galore = GaLore([{"params": [ours], "lr": 0.1, "weight_decay": 0.1}], betas=(0.9, 0.99), eps=1e-8, rank=4, every_steps=2, scale=1.0)
    adamw = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        ours.grad, theirs.grad = diagonal * (step + 1), diagonal * (step + 1)
        galore.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_the_subspace_holds_as_much_of_the_gradient_as_the_best_one() -> None:
    for shape in [(40, 90), (90, 40)]:
        strong = torch.logspace(0, -3, 40)  # a gradient whose directions fade, as real ones do
        u, v = torch.linalg.qr(matrix(shape[0], 40).detach())[0], torch.linalg.qr(matrix(shape[1], 40, seed=1).detach())[0]
        gradient = (u * strong) @ v.T
        kept = project(gradient, subspace(gradient, 10)).norm()
        assert kept == pytest.approx(float(strong[:10].norm()), rel=1e-5)


def test_the_subspace_is_renewed_every_n_steps() -> None:
    weight = matrix(8, 10)
    optimizer = GaLore(
        [{"params": [weight], "lr": 0.01, "weight_decay": 0.0}], betas=(0.9, 0.99), eps=1e-8, rank=2, every_steps=3, scale=1.0
    )
    kept = []
    for step in range(7):
        weight.grad = matrix(8, 10, seed=step).detach()
        optimizer.step()
        kept.append(optimizer.state[weight]["projector"].clone())
    changed = [not torch.equal(one, other) for one, other in pairwise(kept)]
    assert changed == [False, False, True, False, False, True]


def test_embeddings_head_and_vectors_are_left_to_adamw() -> None:
    parameters = {
        "model.embed_tokens.weight": matrix(40, 16),
        "lm_head.weight": matrix(40, 16),
        "model.norm.weight": torch.nn.Parameter(torch.ones(16)),
        "model.layers.0.mlp.up_proj.weight": matrix(32, 16),
    }
    groups = assign_groups(parameters, settings(galore={"rank": 8}, groups={"lm_head": {"lr_ratio": 0.5}}))
    assert {group.name: group.names for group in groups} == {
        "lm_head, AdamW": ("lm_head.weight",),
        "(rest)": ("model.layers.0.mlp.up_proj.weight",),
        "(rest), AdamW": ("model.embed_tokens.weight",),
        "(rest), no decay, AdamW": ("model.norm.weight",),
    }


def test_a_rank_that_projects_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no hidden matrix") as caught:
        assign_groups({"model.layers.0.mlp.up_proj.weight": matrix(32, 16)}, settings())
    assert "rank" in caught.value.problems[0].fix
