"""Whole runs: every figure against PEFT's own delta of the loaded adapter, or the difference of two models, with dense SVDs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune import api
from finetune.analysis.adapter import AdapterFile
from finetune.analysis.analyze import ModuleUpdate, RunAnalysis
from finetune.config.schema import FourBit
from finetune.errors import ConfigError, FinetuneError, VerificationError
from finetune.model.correction import Corrections
from finetune.model.quantize import roundtrip

Q = "model.layers.1.self_attn.q_proj"
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 8, "precision": "fp32", "tokens_per_device": 256}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, chat_file: Path, train_here: Callable[..., Path]
) -> Callable[..., Path]:
    """(**sections) -> finished run of three steps; the same sections give the same run."""
    made: dict[str, Path] = {}

    def run(**sections: Any) -> Path:
        key = json.dumps(sections, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            config = {
                "model": {"id": str(tiny_model_dir)},
                "tuning": {"method": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"},
                "optimizer": {"learning_rate": 0.01},
                "data": {"train": [{"source": str(chat_file)}], "validation": {"fraction": 0.2}, "max_tokens": 256},
                "train": SHORT,
                "output": str(folder / f"run{len(made)}"),
            }
            (folder / "run.yaml").write_text(json.dumps(config | sections))
            made[key] = train_here(folder / "run.yaml")
        return made[key]

    return run


def only(path: Path) -> RunAnalysis:
    (found,) = api.analyze([path]).runs
    return found


def peft_deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """delta of every adapted module (d_out, d_in) fp32, as PEFT forms it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return {
        name: module.get_delta_weight("default").detach().float()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight")
    }


def require_dense(found: ModuleUpdate, delta: torch.Tensor, weight: torch.Tensor) -> None:
    """Every figure of ``found`` from full matrices in fp64."""
    u, sigma, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    live = sigma[sigma > 1e-6 * sigma[0]]
    shares = live / live.sum()
    rank = min(found.rank, len(live))
    assert found.shape == tuple(weight.shape)
    assert found.norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert found.relative_norm == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
    assert found.singular_values[:rank] == pytest.approx(sigma[:rank].tolist()[: len(found.singular_values)], rel=1e-3)
    assert found.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-3)
    there = (u[:, :rank].T @ weight.double() @ vh[:rank].T).norm()
    assert found.amplification == pytest.approx(float(delta.norm() / there), rel=1e-2)


def base_weights(base: Path) -> Mapping[str, torch.Tensor]:
    return {name: weight.float() for name, weight in load_file(base / "model.safetensors").items()}


@pytest.mark.parametrize(
    "tuning",
    [
        {"method": "lora", "rank": 4, "alpha": 8},
        {"method": "lora", "rank": 4, "alpha": 8, "scaling": "rslora", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up": 3}},
        {"method": "lora", "rank": 4, "alpha": 8, "targets": ["v_proj"], "embeddings": "lora"},
        {"method": "tied-lora", "rank": 4, "alpha": 8},
        {"method": "lora", "rank": 2, "alpha": 4, "init": {"method": "pissa"}},
    ],
    ids=["lora", "rslora-patterns", "embedding", "tied", "pissa"],
)
def test_an_adapters_figures_are_those_of_pefts_delta(tuning: dict[str, Any], trained: Callable[..., Path], tiny_model_dir: Path) -> None:
    path = trained(tuning=tuning)
    found, deltas, weights = only(path), peft_deltas(tiny_model_dir, path / "adapter"), base_weights(tiny_model_dir)
    assert {module.module for module in found.modules} == set(deltas)
    for module in found.modules:
        require_dense(module, deltas[module.module], weights[f"{module.module}.weight"])
        assert module.captured == 1.0
        assert 1.0 <= module.effective_rank <= module.rank_bound + 1e-6
        assert module.magnitude_change is None


@pytest.mark.parametrize(
    ("embeddings", "said"),
    [
        ("full", "trained as a whole and not analyzed: lm_head.weight, model.embed_tokens.weight"),
        ("new-tokens", "the rows of the new tokens were trained too and are not analyzed: model.embed_tokens"),
    ],
)
def test_what_trains_as_a_whole_is_said_to_be_left_out(
    embeddings: str, said: str, trained: Callable[..., Path], tiny_model_dir: Path
) -> None:
    found = only(
        trained(
            model={"id": str(tiny_model_dir), "new_tokens": ["[note]", "[dose]"]},
            tuning={"method": "lora", "rank": 4, "alpha": 8, "embeddings": embeddings},
        )
    )
    assert len(found.modules) == 14
    assert found.notes == (said,)


def test_pissa_is_measured_from_its_start(trained: Callable[..., Path]) -> None:
    found = only(trained(tuning={"method": "lora", "rank": 2, "alpha": 4, "init": {"method": "pissa"}}))
    assert found.measured == "s(BA - B0 A0)"
    assert {(module.rank, module.rank_bound) for module in found.modules} == {(2, 4)}
    assert "did not begin at zero" in found.notes[0]


@pytest.mark.parametrize("iterations", [1, 2])
def test_loftq_is_measured_from_its_start_against_the_dequantized_base(
    iterations: int, trained: Callable[..., Path], tiny_model_dir: Path
) -> None:
    path = trained(
        tuning={"method": "lora", "rank": 4, "alpha": 8, "init": {"method": "loftq", "iterations": iterations}},
        quantization={"method": "nf4"},
    )
    found, deltas, weights = only(path), peft_deltas(tiny_model_dir, path / "adapter"), base_weights(tiny_model_dir)
    nf4 = FourBit(method="nf4")
    assert found.measured == "s(BA - B0 A0)"
    with Corrections(path / "adapter") as corrections:
        for module in found.modules:
            correction = corrections.read(module.module)
            source = weights[f"{module.module}.weight"]
            if correction.base is not None:
                source = correction.base.added_to(source, -1.0)
            start = correction.start
            delta = deltas[module.module] - start.scale * start.b @ start.a
            require_dense(module, delta, roundtrip(source, nf4, torch.float32))


def test_dora_tells_direction_and_magnitude_apart(trained: Callable[..., Path], tiny_model_dir: Path) -> None:
    path = trained(tuning={"method": "lora", "rank": 4, "alpha": 8, "dora": True})
    found, weights = only(path), base_weights(tiny_model_dir)
    stored = load_file(path / "adapter" / "adapter_model.safetensors")
    (module,) = (module for module in found.modules if module.module == Q)
    a, b = (stored[f"base_model.model.{Q}.lora_{side}.weight"] for side in "AB")
    require_dense(module, 2.0 * b @ a, weights[f"{Q}.weight"])
    magnitude = next(value for key, value in stored.items() if Q in key and "magnitude" in key)
    assert module.magnitude_change == pytest.approx(float((magnitude / weights[f"{Q}.weight"].norm(dim=1) - 1).abs().mean()), rel=1e-4)
    assert module.magnitude_change > 1e-4
    assert any("DoRA" in note for note in found.notes)


def test_adalora_is_p_lambda_q(trained: Callable[..., Path], tiny_model_dir: Path) -> None:
    path = trained(
        tuning={"method": "adalora", "rank": 4, "alpha": 8, "every_steps": 1, "warmup_ratio": 0.0, "final_ratio": 0.1},
        train={**SHORT, "epochs": 3},
    )
    found, deltas, weights = only(path), peft_deltas(tiny_model_dir, path / "adapter"), base_weights(tiny_model_dir)
    for module in found.modules:
        if module.norm:
            require_dense(module, deltas[module.module], weights[f"{module.module}.weight"])


def test_full_tuning_is_the_difference_of_two_models(trained: Callable[..., Path], tiny_model_dir: Path) -> None:
    path = trained(tuning={"method": "full"}, optimizer={"learning_rate": 0.001})
    found, before = only(path), base_weights(tiny_model_dir)
    after = {name: weight.float() for name, weight in load_file(path / "model" / "model.safetensors").items()}
    assert found.measured == "W' - W"
    assert len(found.modules) == 15  # seven in each of two layers, and the embedding
    for module in found.modules:
        weight = before[f"{module.module}.weight"]
        delta = after[f"{module.module}.weight"] - weight
        assert module.captured == pytest.approx(1.0, abs=1e-4)  # 64 directions are all that these have
        require_dense(module, delta, weight)
    assert found.modules[-1].kind == "embed_tokens"
    assert any("5 tensors are no matrices" in note for note in found.notes)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_spectrum_chose_is_what_changed(method: str, trained: Callable[..., Path], tiny_model_dir: Path) -> None:
    rate = {"learning_rate": 0.001 if method == "full" else 0.01}
    path = trained(tuning={"method": method, "targets": {"spectrum": 0.5}}, optimizer=rate)
    found, expected = only(path), api.spectrum(str(tiny_model_dir), share=0.5).chosen
    assert sorted(module.module for module in found.modules) == sorted(expected)
    assert len(expected) == 7
    if method == "full":
        assert any("8 matrices did not change" in note for note in found.notes)  # the other seven, and the embedding


# --- pairs ---------------------------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_by_a_and_by_update(trained: Callable[..., Path], tiny_model_dir: Path) -> None:
    first, second = trained(), trained(seed=5)
    (pair,) = api.analyze([first, second]).pairs
    assert (pair.first, pair.second) == (str(first), str(second))
    assert len(pair.similarities) == 28
    one = {(similarity.module, similarity.of): similarity for similarity in pair.similarities}
    stored = [load_file(path / "adapter" / "adapter_model.safetensors")[f"base_model.model.{Q}.lora_A.weight"] for path in (first, second)]
    left, right = (torch.linalg.svd(a.double(), full_matrices=False)[2].T for a in stored)
    deltas = [peft_deltas(tiny_model_dir, path / "adapter")[Q] for path in (first, second)]
    u_left, u_right = (torch.linalg.svd(delta.double(), full_matrices=False)[2].T for delta in deltas)
    for i, j, row, column in ((1, 1, 0, 0), (1, 4, 0, 1), (4, 1, 1, 0), (4, 4, 1, 1)):
        expected = float((left[:, :i].T @ right[:, :j]).square().sum()) / min(i, j)
        assert one[Q, "A"].phi[row][column] == pytest.approx(expected, rel=1e-6)
        expected = float((u_left[:, :i].T @ u_right[:, :j]).square().sum()) / min(i, j)
        assert one[Q, "update"].phi[row][column] == pytest.approx(expected, rel=1e-3)


def test_only_runs_of_one_start_are_said_to_begin_alike(trained: Callable[..., Path]) -> None:
    gaussian = {"method": "lora", "rank": 4, "alpha": 8, "targets": "all-linear", "init": {"method": "gaussian"}}
    longer = {"learning_rate": 0.02}
    for other, same in (({"optimizer": longer}, True), ({"seed": 5}, False), ({"tuning": gaussian}, False)):
        assert [pair.same_start for pair in api.analyze([trained(), trained(**other)]).pairs] == [same]


def test_a_copy_of_a_run_is_the_same_run_to_phi(trained: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(trained(), tmp_path / "copy")
    (pair,) = api.analyze([trained(), tmp_path / "copy"]).pairs
    for similarity in pair.similarities:
        assert [similarity.at(size) for size in similarity.sizes] == pytest.approx([1.0] * len(similarity.sizes))


def test_runs_of_one_name_are_told_apart_in_a_plot(trained: Callable[..., Path], tmp_path: Path) -> None:
    first = trained()
    second = tmp_path / first.name
    shutil.copytree(first, second)
    assert api.analyze([first]).title.endswith(f": {first.name}")
    assert api.analyze([first, second]).title.endswith(f": {first}, {second}")


def test_runs_of_different_methods_are_compared_by_update_alone(trained: Callable[..., Path]) -> None:
    (pair,) = api.analyze([trained(), trained(tuning={"method": "full"}, optimizer={"learning_rate": 0.001})]).pairs
    assert {similarity.of for similarity in pair.similarities} == {"update"}
    assert len(pair.similarities) == 14


def test_runs_that_share_no_module_are_refused(trained: Callable[..., Path]) -> None:
    lora = {"method": "lora", "rank": 4, "alpha": 8}
    with pytest.raises(VerificationError, match="no module of one name"):
        api.analyze([trained(tuning={**lora, "targets": ["q_proj"]}), trained(tuning={**lora, "targets": ["v_proj"]})])


# --- what is refused -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt", "ia3", "norm"])
def test_methods_without_a_matrix_say_what_can_be_analyzed(method: str, trained: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=f"{method} leaves no") as error:
        api.analyze([trained(tuning={"method": method})])
    assert "lora" in error.value.problems[0].fix


def test_a_run_named_twice_is_refused(trained: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        api.analyze([trained(), trained()])


def damaged(source: Path, destination: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """A copy of an adapter directory with its tensors and configuration changed."""
    shutil.copytree(source, destination)
    tensors, config = load_file(destination / "adapter_model.safetensors"), json.loads((destination / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, destination / "adapter_model.safetensors", {"format": "pt"})
    (destination / "adapter_config.json").write_text(json.dumps(config))
    return destination


A = f"base_model.model.{Q}.lora_A.weight"
B = f"base_model.model.{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda tensors, _: tensors.pop(B), "no known use"),
        (lambda tensors, _: tensors.update({"base_model.model.extra": torch.ones(2)}), "no known use"),
        (lambda tensors, _: tensors.update({A: tensors[A][:2].clone()}), "have the shapes"),
        (lambda tensors, _: tensors[A].fill_(math.nan), "NaN"),
        (lambda tensors, _: tensors.clear(), "holds nothing"),
        (lambda _, config: config.update(r=8), "have rank 4, not 8"),
        (lambda _, config: config.update(peft_type="VERA"), "no low-rank factors"),
        (lambda _, config: config.update(init_lora_weights="pissa"), "changes its base"),
    ],
)
def test_an_adapter_that_is_not_understood_is_refused(
    change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None], what: str, trained: Callable[..., Path], tmp_path: Path
) -> None:
    directory = damaged(trained() / "adapter", tmp_path / "adapter", change)
    with pytest.raises(VerificationError, match=what), AdapterFile(directory, loftq=False, doubled=False) as adapter:
        list(adapter.updates())


def test_a4_a_changed_file_of_the_run_is_refused(trained: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(trained(), tmp_path / "run")
    with (tmp_path / "run" / "adapter" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x80?")
    with pytest.raises(FinetuneError, match="not the file that was saved"):
        api.analyze([tmp_path / "run"])
