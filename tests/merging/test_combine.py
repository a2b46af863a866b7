"""Combined files against dense references: whole weights as PEFT merges each adapter, and the papers' formulas over their differences."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from finetune.config.combine import Plan, weights_of
from finetune.config.combine_file import load_plan
from finetune.config.schema import FourBit, NoQuantization
from finetune.errors import ConfigError, VerificationError
from finetune.merging.combine_deltas import Combination, Updates
from finetune.merging.combine_members import Member
from finetune.merging.combine_reference import sampled_rows
from finetune.merging.combine_write import require_low_rank, write_adapter, write_model
from finetune.merging.fold import fold
from finetune.merging.identity import require_rows
from finetune.merging.inputs import Base, MergeSource
from tests.merging.conftest import Case as Trained
from tests.merging.conftest import build, randomize, write_llama

ATTENTION = ["q_proj", "v_proj"]
KINDS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "rslora": LoraConfig(r=9, lora_alpha=3, use_rslora=True, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "patterns": LoraConfig(
        r=4, target_modules=ATTENTION, rank_pattern={"layers.1.*v_proj": 7}, alpha_pattern={"q_proj": 2}, task_type="CAUSAL_LM"
    ),
    "copies": LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["embed_tokens", "model.norm"], task_type="CAUSAL_LM"),
    "rows": LoraConfig(r=2, target_modules=["o_proj"], trainable_token_indices={"embed_tokens": [3, 50, 96]}, task_type="CAUSAL_LM"),
    "embedding": LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens", "k_proj"], task_type="CAUSAL_LM"),
    "head": LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=8, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "norm": LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"], task_type="CAUSAL_LM"),
}


def untied_model(base: Path) -> Any:
    """The base in fp32 with a head of its own: PEFT adds an update of a tied pair to both."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def make_adapter(base: Path, kind: str, directory: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(untied_model(base), copy.deepcopy(KINDS[kind]))
    randomize(model, seed)
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def states(base: Path, adapters: list[Path]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """All weights of the base, and of each adapter merged by PEFT."""
    merged = []
    for adapter in adapters:
        live = PeftModel.from_pretrained(untied_model(base), adapter).eval()
        merged.append({name: value.detach().clone() for name, value in live.merge_and_unload().state_dict().items()})
    return {name: value.clone() for name, value in untied_model(base).state_dict().items()}, merged


# --- the papers' formulas over whole models ------------------------------------------------------------------------------------------


def flat_trimmed(task: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """Keep the largest of all elements that the adapter changed, wherever they are (2306.01708, algorithm 1)."""
    touched = {name: delta for name, delta in task.items() if delta.any()}
    magnitudes = torch.cat([delta.flatten() for delta in touched.values()]).abs().sort(descending=True).values
    least = magnitudes[math.floor(density * len(magnitudes) + 1e-9) - 1]
    return {name: torch.where(delta.abs() >= least, delta, 0.0) for name, delta in task.items()}


def reference(plan: Plan, base: dict[str, Tensor], merged: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """theta_0 + combined task vectors, dense, for the methods without chance."""
    tasks = [{name: one[name] - base[name] for name in base} for one in merged]
    if plan.method == "average":
        return {name: base[name] + sum(task[name] for task in tasks) / len(tasks) for name in base}
    if plan.method in ("ties", "magnitude-prune"):
        tasks = [flat_trimmed(task, plan.density) for task in tasks]
    weighed = [{name: weight * delta for name, delta in task.items()} for weight, task in zip(weights_of(plan), tasks, strict=True)]
    if plan.method != "ties":
        return {name: base[name] + sum(task[name] for task in weighed) for name in base}
    result = {}
    for name in base:
        stack = torch.stack([task[name] for task in weighed])
        gamma = stack.sum(0).sign()
        agrees = (stack.sign() == gamma) & (gamma != 0)
        result[name] = base[name] + plan.scale * (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return result


# --- helpers -------------------------------------------------------------------------------------------------------------------------

Make = Callable[..., Any]


class Case:
    """Adapters of one base, and what plans make of them, without the proof of the whole command."""

    def __init__(self, folder: Path, base: Path, adapters: list[Path]) -> None:
        self.folder, self.base, self.adapters, self._count = folder, base, adapters, 0

    def plan(self, **fields: Any) -> Plan:
        weights = fields.pop("weights", None)
        entries = [{"path": str(path)} for path in self.adapters]
        if weights:
            entries = [{**entry, "weight": weight} for entry, weight in zip(entries, weights, strict=True)]
        path = self.folder / "plan.yaml"
        path.write_text(json.dumps({"adapters": entries, **fields}))
        return load_plan(path)

    def open(self, stack: ExitStack, **settings: Any) -> Updates:
        sources = [MergeSource(self.base, adapter, *PLAIN, **settings) for adapter in self.adapters]
        return Updates.open([Member(str(source.adapter_dir), 1.0, source, (), (), "", False) for source in sources], stack)

    def write(self, plan: Plan, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The combined model's weights, whose rows the second implementation confirms."""
        self._count += 1
        destination = self.folder / f"out{self._count}"
        destination.mkdir()
        with ExitStack() as stack:
            combination = Combination.of(self.open(stack), plan, weights_of(plan))
            write_model(combination, destination, dtype, self.base, lambda *_: None)
            require_rows(sampled_rows(combination), destination)
        model = AutoModelForCausalLM.from_pretrained(destination, dtype=dtype)
        return {name: value.detach() for name, value in model.state_dict().items()}


PLAIN = (NoQuantization(method="none"), torch.float32)


@pytest.fixture
def make_case(tmp_path: Path) -> Make:
    """(*kinds, tied=False) -> adapters of one base."""

    def build(*kinds: str, tied: bool = False) -> Case:
        base = write_llama(tmp_path / "base", tied=tied, dtype=torch.float32)
        adapters = [make_adapter(base, kind, tmp_path / f"{number}-{kind}", 10 + number) for number, kind in enumerate(kinds)]
        return Case(tmp_path, base, adapters)

    return build


PLANS: dict[str, dict[str, Any]] = {
    "average": {"method": "average"},
    "task-arithmetic": {"method": "task-arithmetic", "weights": (0.7, -1.3, 0.4)},
    "ties": {"method": "ties", "density": 0.3, "scale": 1.2},
    "ties, weighted": {"method": "ties", "density": 0.5, "weights": (1.0, -0.5, 2.0)},
    "magnitude-prune": {"method": "magnitude-prune", "density": 0.4, "weights": (1.0, 0.5, -0.5)},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_different_ranks_scales_and_targets_mix_as_the_papers_say(make_case: Make, plan: dict[str, Any]) -> None:
    case = make_case("lora", "rslora", "dora")
    found = case.plan(**plan)
    expected = reference(found, *states(case.base, case.adapters))
    written = case.write(found)
    assert set(written) == set(expected)
    for name, value in expected.items():
        # PEFT's merge forms W + delta in fp32, so its difference to W is exact to the last bits of W: elements at the edge of trimming
        differs = ~torch.isclose(written[name], value, rtol=1e-4, atol=2e-6)
        assert float(differs.float().mean()) < (2e-3 if "density" in plan else 1e-9), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kinds", [("copies", "rows"), ("embedding", "lora"), ("adalora", "vera"), ("ia3", "norm"), ("head", "patterns")])
def test_whole_copies_rows_scales_and_norms_combine_like_all_weights(make_case: Make, kinds: tuple[str, str], tied: bool) -> None:
    if tied and "rows" in kinds:
        pytest.skip("an adapter of an untied model; tied rows are tested apart")
    case = make_case(*kinds, tied=tied)
    for fields in (PLANS["average"], {"method": "task-arithmetic", "weights": (0.5, 2.0)}):
        plan = case.plan(**fields)
        expected, written = reference(plan, *states(case.base, case.adapters)), case.write(plan)
        assert set(written) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(written[name], value, rtol=1e-4, atol=5e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_one_adapter_with_weight_one_is_its_merge(make_case: Make) -> None:
    case = make_case("dora")
    _, (merged,) = states(case.base, case.adapters)
    written = case.write(case.plan(method="task-arithmetic"))
    for name, value in merged.items():
        torch.testing.assert_close(written[name], value, rtol=1e-5, atol=2e-6)


def test_an_average_divides_by_all_adapters_a_missing_target_counting_as_zero(make_case: Make) -> None:
    case = make_case("lora", "rslora")  # only the first one has gate_proj
    base, (first, _) = states(case.base, case.adapters)
    written = case.write(case.plan(method="average"))
    name = "model.layers.0.mlp.gate_proj.weight"
    torch.testing.assert_close(written[name] - base[name], (first[name] - base[name]) / 2, rtol=1e-3, atol=2e-6)
    ties = case.write(case.plan(method="ties", density=1.0))
    torch.testing.assert_close(ties[name], first[name], rtol=1e-4, atol=2e-6)


def test_a_skill_is_taken_away_again(make_case: Make) -> None:
    case = make_case("lora", "lora")
    case.adapters[1] = case.adapters[0]
    base, _ = states(case.base, [])
    written = case.write(case.plan(method="task-arithmetic", weights=(1.0, -1.0)))
    for name, value in base.items():
        assert torch.equal(written[name], value), name


def test_trimming_by_weight_is_pefts(make_case: Make) -> None:
    case = make_case("rslora", "patterns")
    from peft.utils import merge_utils

    base, merged = states(case.base, case.adapters)
    written = case.write(case.plan(method="ties", density=0.25, trim="tensor"))
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        expected = base[name] + merge_utils.ties([one[name] - base[name] for one in merged], torch.ones(2), 0.25)
        differs = ~torch.isclose(written[name], expected, rtol=1e-4, atol=2e-6)
        assert float(differs.float().mean()) < 2e-3


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
def test_dare_draws_by_seed_place_and_name_alone(make_case: Make, method: str) -> None:
    case = make_case("lora", "rslora")
    first = case.write(case.plan(method=method, density=0.3, seed=4))
    assert all(torch.equal(value, first[name]) for name, value in case.write(case.plan(method=method, density=0.3, seed=4)).items())
    other = case.write(case.plan(method=method, density=0.3, seed=5))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(other[name], first[name])
    # the second adapter's draw of a weight is its own, whatever else is in the plan
    base, merged = states(case.base, case.adapters)
    gate = "model.layers.1.mlp.gate_proj.weight"
    delta, kept = (merged[0][gate] - base[gate]), (first[gate] - base[gate])
    dropped = kept.abs() < 1e-7
    assert float(dropped.float().mean()) == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(kept[~dropped], (delta / 0.3)[~dropped], rtol=1e-2, atol=1e-5)
    case.adapters = case.adapters[:1]
    alone = case.write(case.plan(method=method, density=0.3, seed=4))
    assert torch.equal(alone[gate], first[gate])


@pytest.mark.parametrize("parts", [False, True])
def test_a8_a_tied_pair_stays_tied_unless_an_adapter_parts_it(tmp_path: Path, parts: bool) -> None:
    """Rows of a tied pair change both sides. With an adapter of the embedding alone, the combination has a head of its own."""
    base = write_llama(tmp_path / "base", tied=True, dtype=torch.float32)
    torch.manual_seed(0)
    tied = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["o_proj"], trainable_token_indices=[3, 50])
    )
    randomize(tied, 3)
    tied.save_pretrained(tmp_path / "rows", save_embedding_layers=False)
    rows = load_file(tmp_path / "rows" / "adapter_model.safetensors")
    adapters = [tmp_path / "rows", make_adapter(base, "embedding" if parts else "rslora", tmp_path / "other", 5)]
    case = Case(tmp_path, base, adapters)
    written = case.write(case.plan(method="task-arithmetic"))
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    trained = next(value for key, value in rows.items() if "trainable_tokens_delta" in key)
    expected = start["model.embed_tokens.weight"].clone()
    expected[[3, 50]] = trained
    torch.testing.assert_close(written["lm_head.weight"], expected, rtol=1e-5, atol=1e-6)
    out = json.loads((tmp_path / "out1" / "config.json").read_text())
    assert out["tie_word_embeddings"] is not parts
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"]) is not parts
    if parts:
        _, (merged,) = states(base, adapters[1:])
        update = merged["model.embed_tokens.weight"] - start["model.embed_tokens.weight"]
        torch.testing.assert_close(written["model.embed_tokens.weight"], expected + update, rtol=1e-4, atol=5e-6)


def test_damage_in_what_was_written_is_noticed_by_the_second_implementation(make_case: Make) -> None:
    case = make_case("lora", "rslora")
    plan = case.plan(method="ties", density=0.5)
    case.write(plan)
    weights = case.folder / "out1" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5000:-4000] = bytes(1000)
    weights.write_bytes(content)
    with ExitStack() as stack, pytest.raises(VerificationError, match="differs"):
        require_rows(sampled_rows(Combination.of(case.open(stack), plan, weights_of(plan))), case.folder / "out1")


def test_a_tensor_of_no_use_is_an_error(make_case: Make) -> None:
    case = make_case("lora", "rslora")
    path = case.adapters[1] / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(9, 64)}, path)
    with pytest.raises(VerificationError, match=r"layers\.7"):
        case.write(case.plan(method="average"))


# --- adapters ------------------------------------------------------------------------------------------------------------------------


def as_adapter(case: Case, plan: Plan, rank: int) -> tuple[Any, Path]:
    destination = case.folder / f"adapter-{rank}"
    destination.mkdir()
    with ExitStack() as stack:
        updates = case.open(stack)
        require_low_rank(updates, rank)
        report = write_adapter(Combination.of(updates, plan, weights_of(plan)), destination, rank, "owner/base", lambda *_: None)
    return report, destination


@pytest.mark.parametrize("kinds", [("lora", "rslora"), ("embedding", "lora"), ("head", "vera")])
def test_an_adapter_of_the_sum_of_the_ranks_loses_nothing(make_case: Make, kinds: tuple[str, str]) -> None:
    case = make_case(*kinds)
    plan = case.plan(method="task-arithmetic", weights=(0.7, -0.4))
    report, destination = as_adapter(case, plan, 16)
    assert report.error < 1e-5
    config = json.loads((destination / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (16, 16, False, False)
    assert config["base_model_name_or_path"] == "owner/base"
    live = PeftModel.from_pretrained(untied_model(case.base), destination).merge_and_unload().state_dict()
    for name, value in case.write(plan).items():
        torch.testing.assert_close(live[name], value, rtol=1e-3, atol=2e-5)


def test_the_error_of_a_smaller_rank_is_that_of_the_discarded_singular_values(make_case: Make) -> None:
    case = make_case("lora", "rslora")
    plan = case.plan(method="ties", density=0.3)
    report, _ = as_adapter(case, plan, 4)
    base, _ = states(case.base, [])
    lost = whole = 0.0
    by_kind: dict[str, list[float]] = {}
    for name, value in case.write(plan).items():
        delta = (value - base[name]).double()
        if delta.any():
            values = torch.linalg.svdvals(delta).square()
            lost, whole = lost + float(values[4:].sum()), whole + float(values.sum())
            sums = by_kind.setdefault(name.split(".")[-2], [0.0, 0.0])
            sums[0], sums[1] = sums[0] + float(values[4:].sum()), sums[1] + float(values.sum())
    assert report.error == pytest.approx(math.sqrt(lost / whole), rel=1e-3)
    assert report.errors == pytest.approx({kind: math.sqrt(one / all_) for kind, (one, all_) in by_kind.items()}, rel=1e-3)


def test_what_no_lora_can_hold_is_refused_with_an_alternative(make_case: Make) -> None:
    with ExitStack() as stack, pytest.raises(ConfigError, match="not a product of factors") as caught:
        require_low_rank(make_case("lora", "copies").open(stack), 8)
    assert "kind: model" in caught.value.problems[0].fix


def test_a_rank_beyond_every_weight_is_refused(make_case: Make) -> None:
    with ExitStack() as stack, pytest.raises(ConfigError, match="rank 65 is more") as caught:
        require_low_rank(make_case("lora", "rslora").open(stack), 65)
    assert "rank 64" in caught.value.problems[0].fix


def test_narrow_modules_are_filled_up(make_case: Make) -> None:
    case = make_case("lora", "rslora")
    report, destination = as_adapter(case, case.plan(method="average"), 40)
    assert report.padded == 4  # k_proj and v_proj of two layers have 32 rows
    live = PeftModel.from_pretrained(untied_model(case.base), destination).merge_and_unload().state_dict()
    for name, value in case.write(case.plan(method="average")).items():
        torch.testing.assert_close(live[name], value, rtol=1e-3, atol=2e-5)


# --- where training began ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_a18_an_average_is_the_mean_of_the_merges_whatever_training_began_at(
    tmp_path: Path, base: Base, iterations: int, dora: bool
) -> None:
    """LoftQ's start counts once: summed as s B A it would count as often as there are adapters, and drop out at a weight of zero."""
    made = [
        build(Trained(quantization=FourBit(method="nf4"), loftq=iterations, lora={"use_dora": dora}), tmp_path / str(n)) for n in (0, 1)
    ]
    path = made[1].source.adapter_dir / "adapter_model.safetensors"
    save_file({key: value * (1.3 if "lora_B" in key else 1.0) for key, value in load_file(path).items()}, path)
    sources = [replace(one.source, base=base, base_dir=made[0].source.base_dir) for one in made]
    merged = []
    for number, source in enumerate(sources):
        fold(source, tmp_path / f"merged{number}", torch.float32)
        merged.append(load_file(tmp_path / f"merged{number}" / "model.safetensors"))
    plan_file = tmp_path / "plan.yaml"
    plan_file.write_text(json.dumps({"method": "average", "adapters": [{"path": str(source.adapter_dir)} for source in sources]}))
    plan = load_plan(plan_file)
    (tmp_path / "out").mkdir()
    with ExitStack() as stack:
        members = [Member("", 0.5, source, (), (), "", True) for source in sources]
        combination = Combination.of(Updates.open(members, stack), plan, weights_of(plan))
        write_model(combination, tmp_path / "out", torch.float32, sources[0].base_dir, lambda *_: None)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(merged[0])
    assert any(not torch.equal(merged[0][name], merged[1][name]) for name in written)
    for name, value in written.items():
        torch.testing.assert_close(value, (merged[0][name] + merged[1][name]) / 2, rtol=1e-5, atol=2e-6)
