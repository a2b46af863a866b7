"""What a plan counts from shapes, against the model that is really built: every method on eight architectures, tensor by tensor."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config.schema import Config, Model, SpectrumTargets
from finetune.errors import ConfigError
from finetune.model import adapters
from finetune.model.adapters import attach, trainable
from finetune.model.methods import Given
from finetune.model.targets import linear_modules
from finetune.model.tokens import enlarge
from finetune.planning.groups import ParameterGroup, assign_groups
from finetune.planning.lookup import find_shape
from finetune.planning.parameters import Parameters, count_parameters
from finetune.planning.shapes import ModelShape, read_shape
from finetune.planning.targets import layer_of

TOKENS = 90
"""Of the tokenizer; the embedding has six rows to spare."""
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "mistral": {"model_type": "mistral"},
    "gemma2": {"model_type": "gemma2", "head_dim": 32},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 32},
    "phi3": {"model_type": "phi3"},
    "olmo2": {"model_type": "olmo2"},
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4},
    "rslora, attention": {"method": "lora", "rank": 5, "scaling": "rslora", "targets": "attention"},
    "lora, mlp": {"method": "lora", "targets": "mlp"},
    "lora, names": {"method": "lora", "targets": ["q_proj", "mlp.down_proj", "model.layers.1.self_attn.o_proj"]},
    "lora, regex": {"method": "lora", "targets": {"regex": r"layers\.1\..*(k|v)_proj"}},
    "lora, patterns": {"method": "lora", "rank": 4, "rank_pattern": {r"layers\.0\.": 2, "down_proj": 9}, "alpha_pattern": {"q_proj": 2.0}},
    "lora, spectrum": {"method": "lora", "rank": 4, "targets": {"spectrum": 0.5}},
    "lora, rank above the sides": {"method": "lora", "rank": 128},
    "lora, orthogonal": {"method": "lora", "rank": 4, "init": {"method": "orthogonal"}},
    "lora, pissa": {"method": "lora", "rank": 4, "init": {"method": "pissa"}},
    "lora, eva": {"method": "lora", "rank": 4, "init": {"method": "eva"}},
    "dora": {"method": "lora", "rank": 4, "dora": True},
    "dora, embeddings": {"method": "lora", "rank": 4, "dora": True, "embeddings": "lora"},
    "lora, embeddings": {"method": "lora", "rank": 4, "embeddings": "lora", "rank_pattern": {"embed_tokens": 7}},
    "lora, embeddings whole": {"method": "lora", "rank": 4, "embeddings": "full"},
    "tied": {"method": "tied-lora", "rank": 4},
    "tied, b": {"method": "tied-lora", "rank": 4, "share": "b", "targets": "attention"},
    "adalora": {"method": "adalora", "rank": 4},
    "adalora, stated": {"method": "adalora", "rank": 4, "init_rank": 5, "targets": "mlp"},
    "vera": {"method": "vera", "rank": 16},
    "vera, attention": {"method": "vera", "rank": 8, "targets": ["q_proj", "v_proj"]},
    "ia3": {"method": "ia3"},
    "prompt": {"method": "prompt", "tokens": 5},
    "prefix": {"method": "prefix", "tokens": 5},
    "norm": {"method": "norm"},
    "houlsby": {"method": "houlsby", "bottleneck": 8},
    "pfeiffer": {"method": "houlsby", "bottleneck": 8, "placement": "mlp"},
    "full": {"method": "full"},
    "full, spectrum": {"method": "full", "targets": {"spectrum": 0.5}},
}
WITH_TOKENS: dict[str, dict[str, Any]] = {
    "rows": {"method": "lora", "rank": 4, "embeddings": "new-tokens"},
    "whole": {"method": "lora", "rank": 4, "embeddings": "full"},
    "full": {"method": "full"},
}
OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {},
    {"lora_plus_ratio": 4.0},
    {"groups": {r"layers\.0\.": {"lr_ratio": 0.5}, "(q|down)_proj": {"lr_ratio": 2.0}, ".": {"weight_decay": 0.1}}},
    {"method": "muon"},
    {"method": "galore", "galore": {"rank": 2}},
)


def configured(tuning: dict[str, Any], new_tokens: int = 0, **optimizer: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"id": "some/model", "new_tokens": [f"<{number}>" for number in range(new_tokens)]},
            "tuning": tuning,
            "optimizer": optimizer,
            "data": {"train": [{"source": "a.jsonl"}]},
            "output": "out",
        }
    )


def method_of(name: str, architecture: str) -> dict[str, Any]:
    """The section ``name``, with the names that Phi-3 has for its fused projections."""
    text = json.dumps(METHODS[name])
    fused: dict[str, Any] = json.loads(text.replace("q_proj", "qkv_proj").replace('"v_proj"', '"o_proj"'))
    return fused if architecture == "phi3" else METHODS[name]


def shape_of(architecture: str) -> ModelShape:
    return read_shape(SIZES | ARCHITECTURES[architecture], "here", TOKENS)


@pytest.fixture(scope="module")
def base() -> Callable[[str], Any]:
    """A fresh random model of an architecture; built once."""
    made: dict[str, Any] = {}

    def get(architecture: str) -> Any:
        if architecture not in made:
            config = AutoConfig.for_model(**(SIZES | ARCHITECTURES[architecture]))
            made[architecture] = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        return copy.deepcopy(made[architecture])

    return get


def attached(model: Any, config: Config, seed: int = 0) -> Any:
    """``model`` made trainable as a run makes it; the ratios that Spectrum would measure are drawn."""
    ids = range(TOKENS, TOKENS + len(config.model.new_tokens))
    enlarge(model, ids)
    generator = random.Random(seed)
    ratios = {name: generator.random() if seed else -float(layer_of(name) or 0) for name in linear_modules(model)}
    return attach(model, config.tuning, Given(ratios=ratios, new_ids=list(ids)))


def shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assert_equal(plan: Parameters, model: Any) -> None:
    assert shapes(plan.tensors) == shapes(trainable(model))
    assert plan.trainable == sum(parameter.numel() for parameter in trainable(model).values())
    assert plan.total == adapters.count_parameters(model)
    assert plan.base + plan.added == plan.total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_the_plan_of_a_method_is_the_model_that_is_built(method: str, architecture: str, base: Callable[[str], Any]) -> None:
    tuning, shape = method_of(method, architecture), shape_of(architecture)
    config = configured(tuning)
    model = attached(base(architecture), config)
    assert_equal(count_parameters(shape, config), model)
    assert count_parameters(shape, config).base == shape.total
    # which layers Spectrum chooses is not known to a plan, so that groups of layers are left open: a test of its own
    for optimizer in OPTIMIZERS if "spectrum" not in method else (OPTIMIZERS[0], OPTIMIZERS[1], OPTIMIZERS[4]):
        assert_equal_groups(shape, configured(tuning, **optimizer), trainable(model))


def outcome(make: Callable[[], Iterable[ParameterGroup]]) -> list[dict[str, Any]] | str:
    """The groups, or the words in which they are refused."""
    try:
        return [group.summary() | {"rule": group.rule} for group in make()]
    except ConfigError as error:
        return str(error)


def assert_equal_groups(shape: ModelShape, config: Config, built: Any) -> None:
    planned = outcome(lambda: count_parameters(shape, config).groups)
    assert planned == outcome(lambda: assign_groups(built, config.optimizer))
    if not isinstance(planned, str):
        plan = count_parameters(shape, config)
        assert plan.by_group == {group["name"]: group["parameters"] for group in planned}
        assert sum(plan.by_group.values()) == plan.trainable


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("method", WITH_TOKENS)
@pytest.mark.parametrize("added", [4, 9], ids=["spare rows", "more rows"])
def test_rows_of_new_tokens_are_counted(added: int, method: str, architecture: str, base: Callable[[str], Any]) -> None:
    config, shape = configured(WITH_TOKENS[method], added), shape_of(architecture)
    plan = count_parameters(shape, config)
    assert_equal(plan, attached(base(architecture), config))
    assert not plan.notes
    unknown = count_parameters(read_shape(SIZES | ARCHITECTURES[architecture], "here"), config)
    assert "taken to grow" in unknown.notes[0]
    assert unknown.total > plan.total


def test_biases_train_where_there_are_any(base: Callable[[str], Any]) -> None:
    config = configured({"method": "bitfit"})
    plan = count_parameters(shape_of("qwen2"), config)
    assert_equal(plan, attached(base("qwen2"), config))
    assert_equal_groups(shape_of("qwen2"), config, trainable(attached(base("qwen2"), config)))
    with pytest.raises(ConfigError) as planned:
        count_parameters(shape_of("llama"), config)
    with pytest.raises(ConfigError) as refused:
        attached(base("llama"), config)
    assert str(planned.value) == str(refused.value)


def test_veras_random_matrices_are_no_parameters_and_counted_apart(base: Callable[[str], Any]) -> None:
    for method in ("vera", "vera, attention"):
        config = configured(METHODS[method])
        model = attached(base("qwen3"), config)
        drawn = [buffer for name, buffer in model.named_buffers(remove_duplicate=True) if "vera_A" in name or "vera_B" in name]
        assert count_parameters(shape_of("qwen3"), config).buffers == sum(buffer.numel() for buffer in drawn) > 0
    assert count_parameters(shape_of("qwen3"), configured(METHODS["lora"])).buffers == 0


@pytest.mark.parametrize("method", ["lora, spectrum", "full, spectrum"])
def test_what_spectrum_chooses_does_not_change_the_count(method: str, base: Callable[[str], Any]) -> None:
    shape = shape_of("gemma2")
    config = configured(METHODS[method], groups={"attention": {"lr_ratio": 0.5}, "down_proj": {"lr_ratio": 2.0}})
    plan = count_parameters(shape, config)
    assert not plan.notes
    for seed in (1, 2, 3):
        built = trainable(attached(base("gemma2"), config, seed))
        assert plan.trainable == sum(parameter.numel() for parameter in built.values())
        assert plan.by_group == {group.name: group.parameters for group in assign_groups(built, config.optimizer)}


def test_what_spectrum_decides_is_said_to_be_open() -> None:
    shape = shape_of("llama")
    plan = count_parameters(shape, configured(METHODS["lora, spectrum"], groups={r"layers\.1\.": {"lr_ratio": 0.5}}))
    assert plan.by_group == {}
    assert "read off the weights" in plan.notes[0]
    plan = count_parameters(shape, configured(METHODS["lora, spectrum"] | {"rank_pattern": {r"layers\.1\.": 8}}))
    assert plan.notes[0].startswith("about")
    with pytest.raises(ConfigError, match="matches no trainable parameter"):
        count_parameters(shape, configured(METHODS["lora, spectrum"], groups={r"layers\.7\.": {"lr_ratio": 0.5}}))
    assert "pruned from 6 to a mean of 4" in count_parameters(shape, configured(METHODS["adalora"])).notes[0]
    assert count_parameters(shape, configured({"method": "lora", "targets": SpectrumTargets(spectrum=1.0)})).trainable == (
        count_parameters(shape, configured({"method": "lora"})).trainable
    )


@pytest.mark.parametrize(
    ("tuning", "what"),
    [
        ({"targets": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"targets": {"regex": r"layers\.9\."}}, "no linear module"),
        ({"rank_pattern": {"lm_head": 4}}, "no target module matches 'lm_head'"),
    ],
)
def test_what_matches_nothing_is_refused_as_the_model_refuses_it(tuning: dict[str, Any], what: str, base: Callable[[str], Any]) -> None:
    config = configured({"method": "lora"} | tuning)
    with pytest.raises(ConfigError, match=what) as planned:
        count_parameters(shape_of("llama"), config)
    with pytest.raises(ConfigError) as refused:
        attached(base("llama"), config)
    assert str(planned.value) == str(refused.value)


def of(model_id: str, tuning: dict[str, Any]) -> Parameters:
    return count_parameters(find_shape(Model(id=model_id)), configured(tuning))


def test_published_figures() -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert of("meta-llama/Llama-2-7b-hf", {"method": "lora", "rank": 16, "targets": attention}).trainable == 16_777_216
    assert of("meta-llama/Llama-2-7b-hf", {"method": "lora", "rank": 16, "targets": "attention"}).trainable == 16_777_216
    # 2310.11454 (first version, abstract): "1.4M parameters using the Llama2 7B model"
    assert of("meta-llama/Llama-2-7b-hf", {"method": "vera", "rank": 256}).trainable == 1_417_216
    assert of("HuggingFaceTB/SmolLM2-135M", {"method": "lora", "rank": 16}).trainable == 4_884_480
    # the same paper's baseline, LoRA of rank 64 on all linear layers: 159.9M
    assert of("meta-llama/Llama-2-7b-hf", {"method": "lora", "rank": 64}).trainable == 159_907_840


def test_a_plan_of_70b_is_made_at_once_of_the_tensors_of_all_layers() -> None:
    plan = of("meta-llama/Meta-Llama-3-70B", {"method": "lora", "rank": 64})
    assert len(plan.tensors) == 80 * 7 * 2
    assert plan.trainable == 80 * 64 * sum(sides for sides in (8192 + 8192, 8192 + 1024, 8192 + 1024, 8192 + 8192, *(3 * [8192 + 28672])))
    assert plan.total - plan.trainable == 70_553_706_496
    assert torch.Size(next(iter(plan.tensors.values())).shape).numel() == 64 * 8192
