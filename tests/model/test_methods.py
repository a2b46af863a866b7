"""Every method of the `tuning` union: what it trains, where it starts, that it comes back as it was, and how it is switched off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Starcoder2Config,
)

from finetune.config.schema import AdaLora, EightBit, FourBit, NoQuantization, Prefix, Prompt, Quantization, Tuning
from finetune.errors import ConfigError, VerificationError
from finetune.model.adalora import add_penalty, load_rank_state, plan_ranks, pruned_whole, rank_state, update_ranks
from finetune.model.adapters import WEIGHTS, attach, is_adapter, load, read_into, save, switched_off, trainable
from finetune.model.head import target_losses
from finetune.model.load import load_base
from finetune.model.methods import Given
from finetune.model.targets import linear_modules
from finetune.model.virtual import virtual_tokens

Llama = Callable[..., Path]
CPU = torch.device("cpu")
PLAIN = NoQuantization()
BASES = {"none": PLAIN, "nf4": FourBit(method="nf4"), "int8": EightBit(method="int8")}
IDS = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(1))
ROWS = (IDS, torch.ones_like(IDS), torch.ones_like(IDS, dtype=torch.bool))

HIDDEN, INNER, LAYERS, KEYS = 64, 128, 2, 32
LINEAR = (("q", 64, 64), ("k", 64, 32), ("v", 64, 32), ("o", 64, 64), ("gate", 64, 128), ("up", 64, 128), ("down", 128, 64))
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "lora": ({"rank": 4}, LAYERS * sum(4 * (i + o) for _, i, o in LINEAR)),
    "tied-lora": ({"rank": 4}, sum(4 * i for _, i, _ in LINEAR) + LAYERS * sum(4 * o for _, _, o in LINEAR)),
    "tied-lora-b": (
        {"method": "tied-lora", "rank": 4, "share": "b"},
        LAYERS * sum(4 * i for _, i, _ in LINEAR) + sum(4 * o for *_, o in LINEAR),
    ),
    "adalora": ({"rank": 4, "init_rank": 6}, LAYERS * sum(6 * (i + o + 1) for _, i, o in LINEAR)),
    "vera": ({"rank": 16}, LAYERS * sum(16 + o for *_, o in LINEAR)),
    "ia3": ({}, LAYERS * (2 * KEYS + INNER)),
    "prompt": ({"tokens": 5}, 5 * HIDDEN),
    "prefix": ({"tokens": 5}, 5 * LAYERS * 2 * KEYS),
    "norm": ({}, HIDDEN * (2 * LAYERS + 1)),
    "houlsby": ({"bottleneck": 8}, LAYERS * 2 * (2 * 8 * HIDDEN + 8 + HIDDEN)),
}
STARTS_ELSEWHERE = ("prompt", "prefix")
"""Methods that have no start at which they are nothing: their tokens are there from the first step."""


def section(name: str) -> Tuning:
    fields, _ = METHODS[name]
    tuning: Tuning = TypeAdapter(Tuning).validate_python({"method": name} | fields)
    return tuning


def base(llama: Llama, quantization: Quantization = PLAIN, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(llama(dtype=torch.bfloat16), quantization, dtype, CPU)


def attached(llama: Llama, name: str, quantization: Quantization = PLAIN, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = attach(base(llama, quantization, dtype), section(name), Given(seed=3))
    if name == "adalora":
        plan_ranks(model, section(name), 3)
    return model


def train(model: Any, steps: int = 3, begin: int = 0) -> Any:
    model.train()
    adam = torch.optim.SGD(trainable(model).values(), lr=0.05)
    for step in range(begin, begin + steps):
        target_losses(model, *ROWS).mean().backward()
        if isinstance(model, PeftModel) and model.active_peft_config.peft_type == "ADALORA":
            add_penalty(model)
        adam.step()
        if isinstance(model, PeftModel) and model.active_peft_config.peft_type == "ADALORA":
            update_ranks(model, step + 1)
        adam.zero_grad()
    return model.eval()


@torch.no_grad()
def losses(model: Any) -> torch.Tensor:
    return target_losses(model.eval(), *ROWS)


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_trained_parameters_is_the_formula(llama: Llama, name: str) -> None:
    parameters = trainable(attached(llama, name))
    assert sum(parameter.numel() for parameter in parameters.values()) == METHODS[name][1]
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}


@pytest.mark.parametrize("name", METHODS)
def test_m1_the_start_is_the_base_and_so_is_the_switch(llama: Llama, name: str) -> None:
    plain = losses(base(llama))
    model = attached(llama, name)
    start = losses(model)
    assert torch.equal(start, plain) == (name not in STARTS_ELSEWHERE)
    names = list(trainable(model))
    train(model)
    assert is_adapter(model)
    assert (losses(model) - plain).abs().max() > 1e-4
    with switched_off(model):
        assert torch.equal(losses(model), plain)
        assert virtual_tokens(model) == 0
    assert (losses(model) - plain).abs().max() > 1e-4
    assert losses(model).mean() < start.mean()
    assert list(trainable(model)) == names


@pytest.mark.parametrize("name", METHODS)
def test_a11_every_tensor_gets_a_gradient_and_changes(llama: Llama, name: str) -> None:
    model = attached(llama, name)
    before = {key: parameter.detach().clone() for key, parameter in trainable(model).items()}
    target_losses(model.train(), *ROWS).mean().backward()
    assert [key for key, parameter in trainable(model).items() if parameter.grad is None] == []
    model.zero_grad()
    train(model)
    still = {key for key, parameter in trainable(model).items() if torch.equal(parameter, before[key])}
    assert still <= (pruned_whole(model) if name == "adalora" else set())


@pytest.mark.parametrize("quantization", BASES.values(), ids=BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a4_a_loaded_adapter_is_the_trained_one(
    llama: Llama, tmp_path: Path, name: str, quantization: Quantization, dtype: torch.dtype
) -> None:
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast:
        model = train(attached(llama, name, quantization, dtype))
    save(model, tmp_path)
    loaded = load(base(llama, quantization, dtype), tmp_path)
    assert not trainable(loaded)
    with autocast:
        assert torch.equal(losses(loaded), losses(model))
    # without autocast too: merging measures so
    assert losses(loaded).isfinite().all()
    assert torch.equal(losses(loaded), losses(model))
    with torch.no_grad():
        assert loaded(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_d1_a_resumed_adapter_goes_on_as_if_it_had_not_stopped(llama: Llama, tmp_path: Path, name: str) -> None:
    straight = attached(llama, name)
    train(straight)
    halted = train(attached(llama, name), steps=2)
    save(halted, tmp_path)
    torch.manual_seed(5)
    resumed = attach(base(llama), section(name), Given(seed=3))
    read_into(resumed, tmp_path)
    if name == "adalora":
        plan_ranks(resumed, section(name), 3)
        load_rank_state(resumed, *rank_state(halted))
    train(resumed, steps=1, begin=2)
    for (key, one), (other_key, other) in zip(trainable(straight).items(), trainable(resumed).items(), strict=True):
        assert key == other_key
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", METHODS)
def test_a4_a_tensor_that_is_missing_left_over_or_changed_is_noticed(llama: Llama, tmp_path: Path, name: str) -> None:
    save(train(attached(llama, name)), tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    first = min(whole)
    damaged = [{key: value for key, value in whole.items() if key != first}, whole | {f"{first}.odd": torch.ones(2)}]
    for tensors in damaged:
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(VerificationError):
            load(base(llama), tmp_path)
        with pytest.raises(VerificationError):
            read_into(attached(llama, name), tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_a12_bf16_on_request(llama: Llama, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = attach(base(llama), section(name), Given(dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.bfloat16}
    target_losses(model.train(), *ROWS).mean().backward()
    save(model, tmp_path)
    assert torch.equal(losses(load(base(llama), tmp_path)), losses(model))


@pytest.mark.parametrize("name", ["lora", "tied-lora", "adalora", "vera", "ia3", "prompt", "prefix", "norm"])
def test_peft_loads_what_is_saved(llama: Llama, tmp_path: Path, name: str) -> None:
    model = train(attached(llama, name))
    save(model, tmp_path)
    elsewhere = PeftModel.from_pretrained(base(llama), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(elsewhere(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-6)


# --- tied -----------------------------------------------------------------------------------------------------------------------------


def test_tied_layers_share_one_parameter_and_its_gradient_is_the_sum(llama: Llama) -> None:
    model = attached(llama, "tied-lora")
    layers = [model.get_base_model().model.layers[number].self_attn.q_proj for number in range(LAYERS)]
    shared = layers[0].lora_A["default"].weight
    assert layers[1].lora_A["default"].weight is shared
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    target_losses(model, *ROWS).mean().backward()
    total = shared.grad.clone()
    alone = []
    for layer in layers:
        layer.lora_A["default"].weight = torch.nn.Parameter(shared.detach().clone())
    target_losses(model, *ROWS).mean().backward()
    alone = [layer.lora_A["default"].weight.grad for layer in layers]
    torch.testing.assert_close(total, alone[0] + alone[1])


# --- adalora --------------------------------------------------------------------------------------------------------------------------


def test_adalora_ends_at_its_budget_and_a_reload_keeps_it(llama: Llama, tmp_path: Path) -> None:
    model = train(attached(llama, "adalora"))
    values = {key: parameter for key, parameter in model.named_parameters() if ".lora_E." in key}
    assert len(values) == LAYERS * len(LINEAR)
    assert sum(int(value.count_nonzero()) for value in values.values()) == 4 * len(values)
    save(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert {value.shape for key, value in stored.items() if key.endswith("lora_E")} == {(6, 1)}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] is None
    assert model.active_peft_config.rank_pattern is not None


def test_adaloras_penalty_is_that_of_the_paper(llama: Llama) -> None:
    model = attached(llama, "adalora")
    add_penalty(model)
    factors = [p for key, p in trainable(model).items() if ".lora_A." in key or ".lora_B." in key]
    got = [factor.grad.clone() for factor in factors]
    model.zero_grad()
    total = torch.zeros(())
    for key, p in trainable(model).items():
        if ".lora_E." not in key:
            gram = p @ p.T if ".lora_A." in key else p.T @ p
            total = total + ((gram - torch.eye(6)) ** 2).sum().sqrt()
    (0.5 * total / len(factors)).backward()
    for one, factor in zip(got, factors, strict=True):
        torch.testing.assert_close(one, factor.grad)


@pytest.mark.parametrize(("fields", "steps", "named"), [({"init_rank": 4}, 3, "init_rank"), ({"final_ratio": 0.9}, 10, "final_ratio")])
def test_adalora_refuses_a_schedule_without_pruning(llama: Llama, fields: dict[str, Any], steps: int, named: str) -> None:
    tuning = AdaLora(method="adalora", rank=4, **fields)
    with pytest.raises(ConfigError) as caught:
        plan_ranks(attach(base(llama), tuning), tuning, steps)
    assert named in caught.value.problems[0].where


# --- virtual tokens -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_losses_with_virtual_tokens_are_those_of_pefts_forward_whatever_the_padding(llama: Llama, name: str) -> None:
    model = train(attached(llama, name))
    with torch.no_grad():
        logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none")
    torch.testing.assert_close(losses(model), expected.flatten(), rtol=0, atol=1e-5)
    padded = torch.cat([IDS, torch.zeros(len(IDS), 7, dtype=torch.int64)], dim=1)
    attention = torch.cat([torch.ones_like(IDS), torch.zeros(len(IDS), 7, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(target_losses(model, padded, attention, attention.bool()), expected.flatten(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.parametrize("off", [False, True])
def test_what_is_generated_is_what_the_losses_find_likeliest(llama: Llama, name: str, off: bool) -> None:
    model = train(attached(llama, name), steps=6)
    with torch.no_grad(), switched_off(model) if off else torch.no_grad():
        out = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert out.shape == (3, 18)
        found = target_losses(model, out, torch.ones_like(out), torch.ones_like(out, dtype=torch.bool)).view(3, 17)[:, 11:]
        for place in range(6):
            for token in torch.randint(0, 97, (5,)):
                other = out[:, : 13 + place].clone()
                other[:, -1] = token
                last = torch.zeros_like(other, dtype=torch.bool)
                last[:, -1] = True
                assert (target_losses(model, other, torch.ones_like(other), last) >= found[:, place] - 1e-4).all()


def test_prefixes_start_as_activations(llama: Llama) -> None:
    """Those of as many random tokens: what follows is computed as if they stood before it."""
    torch.manual_seed(0)
    model = attach(base(llama), Prefix(method="prefix", tokens=4))
    torch.manual_seed(0)
    torch.nn.Embedding(4, LAYERS * 2 * KEYS)  # what PEFT drew first
    drawn = torch.randint(97, (1, 4))
    whole = torch.cat([drawn.expand(3, -1), IDS], dim=1)
    supervised = torch.ones_like(whole, dtype=torch.bool)
    supervised[:, :5] = False
    with torch.no_grad():
        expected = target_losses(base(llama), whole, torch.ones_like(whole), supervised)
    torch.testing.assert_close(losses(model), expected, rtol=0, atol=1e-5)


def test_prompts_start_as_a_text(tiny_model_dir: Path) -> None:
    model = attach(load_base(tiny_model_dir, NoQuantization(), torch.float32, CPU), Prompt(method="prompt", tokens=6, text="a title"))
    rows = model.prompt_encoder["default"].embedding.weight
    words = model.get_base_model().get_input_embeddings().weight
    assert all((words == row).all(dim=1).any() for row in rows)
    assert torch.equal(rows[0], words[model_ids(tiny_model_dir, "a title")[0]])


def model_ids(directory: Path, text: str) -> list[int]:
    from finetune.model.load import load_tokenizer

    return list(load_tokenizer(directory)(text)["input_ids"])


# --- biases and norms -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2, whose queries, keys and values have biases."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, initializer_range=0.15))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    directory = tmp_path_factory.mktemp("qwen")
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("quantization", BASES.values(), ids=BASES)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"])
def test_bitfit_trains_biases_and_comes_back(
    qwen: Path, tmp_path: Path, quantization: Quantization, dtype: torch.dtype, rounding: float
) -> None:
    def fresh() -> Any:
        return load_base(qwen, quantization, dtype, CPU)

    tuning = TypeAdapter(Tuning).validate_python({"method": "bitfit"})
    plain = losses(fresh())
    model = attach(fresh(), tuning)
    assert sum(parameter.numel() for parameter in trainable(model).values()) == LAYERS * (HIDDEN + 2 * KEYS)
    torch.testing.assert_close(losses(model), plain, rtol=0, atol=rounding)  # in bf16 the bias meets a product that was rounded
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    train(model, steps=10)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trainable(model).items())
    assert losses(model).mean() < plain.mean() - 1e-3
    with switched_off(model):
        torch.testing.assert_close(losses(model), plain, rtol=0, atol=rounding)
    save(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert set(stored) == {f"model.layers.{layer}.self_attn.{part}_proj.bias" for layer in range(LAYERS) for part in "qkv"}
    assert torch.equal(losses(load(fresh(), tmp_path)), losses(model))
    resumed = attach(fresh(), tuning)
    read_into(resumed, tmp_path)
    assert torch.equal(losses(resumed), losses(model))


def test_bitfit_without_biases_offers_norms_and_their_number(llama: Llama) -> None:
    with pytest.raises(ConfigError) as caught:
        attach(base(llama), TypeAdapter(Tuning).validate_python({"method": "bitfit"}))
    assert f"({METHODS['norm'][1]:,} parameters)" in caught.value.problems[0].fix


def test_norm_leaves_the_shifts_of_layer_norms_alone() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = attach(AutoModelForCausalLM.from_config(GPTNeoXConfig(**sizes)), TypeAdapter(Tuning).validate_python({"method": "norm"}))
    assert {name.rpartition(".")[2] for name in trainable(model)} == {"weight"}
    assert sum(parameter.numel() for parameter in trainable(model).values()) == 5 * 32


def test_norm_of_the_builtin_model_trains_what_the_paper_of_methods_says() -> None:
    """35,136 scales: 61 norms of 576."""
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, vocab_size=64)
        )
    from finetune.model.methods import norm_parameters

    assert norm_parameters(model) == 35_136


# --- other architectures, full tuning ---------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONE_KEY = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "intermediate_size")}
ARCHITECTURES: dict[str, tuple[PreTrainedConfig, tuple[str, ...]]] = {
    "capped logits": (Gemma2Config(**SIZES, head_dim=8), ("prompt", "prefix", "norm", "ia3")),
    "one matrix for queries, keys and values": (Phi3Config(**SIZES), ("ia3", "houlsby")),
    "one key head for all": (FalconConfig(**ONE_KEY, new_decoder_architecture=False), ("prefix", "bitfit", "houlsby")),
    "an MLP of other names": (Starcoder2Config(**SIZES), ("ia3", "bitfit")),
    "parallel sublayers": (
        GPTNeoXConfig(**{key: SIZES[key] for key in ONE_KEY}, intermediate_size=64),
        ("prefix", "bitfit", "houlsby", "vera"),
    ),
}


@pytest.mark.parametrize(("architecture", "name"), [(key, name) for key, (_, names) in ARCHITECTURES.items() for name in names])
def test_other_architectures(tmp_path: Path, architecture: str, name: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ARCHITECTURES[architecture][0]).float().save_pretrained(tmp_path / "base")

    def fresh() -> Any:
        return load_base(tmp_path / "base", PLAIN, torch.float32, CPU)

    tuning = TypeAdapter(Tuning).validate_python({"method": name} | METHODS.get(name, ({}, 0))[0])
    model = attach(fresh(), tuning)
    target_losses(model.train(), *ROWS).mean().backward()
    assert [key for key, parameter in trainable(model).items() if parameter.grad is None] == []
    for parameter in trainable(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    save(model, tmp_path)
    loaded = load(fresh(), tmp_path)
    assert torch.equal(losses(loaded), losses(model))
    with switched_off(loaded):
        torch.testing.assert_close(losses(loaded), losses(fresh()), rtol=0, atol=1e-5)
    assert (losses(loaded) - losses(fresh())).abs().max() > 1e-4


def test_full_tuning_by_spectrum_trains_the_chosen_weights_alone(llama: Llama) -> None:
    model = base(llama)
    names = linear_modules(model)
    ratios = {name: float(".1." in name) for name in names}
    model = attach(model, TypeAdapter(Tuning).validate_python({"method": "full", "targets": {"spectrum": 0.5}}), Given(ratios=ratios))
    assert set(trainable(model)) == {f"{name}.weight" for name in names if ".1." in name}
    frozen = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    train(model)
    live = dict(model.named_parameters())
    assert all(torch.equal(live[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("name", ["lora", "tied-lora", "adalora", "vera"])
def test_spectrum_chooses_the_targets_of_every_method_that_has_them(llama: Llama, name: str) -> None:
    model = base(llama)
    ratios = {module: float(".1." in module) for module in linear_modules(model)}
    fields = METHODS[name][0] | {"targets": {"spectrum": 0.5}}
    model = attach(model, TypeAdapter(Tuning).validate_python({"method": name} | fields), Given(ratios=ratios))
    assert trainable(model)
    assert all(".layers.1." in key for key in trainable(model))
