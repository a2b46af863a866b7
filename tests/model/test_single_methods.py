"""What is particular to single methods, other architectures, and full tuning of chosen layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
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

from finetune.config.schema import AdaLora, Lora, NoQuantization, Prefix, Prompt, Quantization, Tuning
from finetune.errors import ConfigError
from finetune.model.adalora import add_penalty, plan_ranks
from finetune.model.adapters import WEIGHTS, attach, load, read_into, save, switched_off, trainable
from finetune.model.head import target_losses
from finetune.model.load import load_base
from finetune.model.methods import Given
from finetune.model.targets import linear_modules
from tests.model.method_cases import (
    BASES,
    CPU,
    HIDDEN,
    IDS,
    KEYS,
    LAYERS,
    LINEAR,
    METHODS,
    PLAIN,
    ROWS,
    Llama,
    attached,
    base,
    losses,
    train,
)

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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dora_on_an_int8_base_trains_on_a_cpu(llama: Llama, tmp_path: Path, checkpointing: bool) -> None:
    """PEFT reads the weight in each forward, and leaves a parameter without scales behind."""
    tuning = Lora(method="lora", rank=4, dora=True)
    torch.manual_seed(0)
    model = attach(base(llama, BASES["int8"]), tuning)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    start = losses(model)
    tuned = losses(train(model, steps=4))
    assert tuned.isfinite().all()
    assert tuned.mean() < start.mean() - 1e-3
    assert torch.equal(losses(model), tuned)
    with switched_off(model):
        assert torch.equal(losses(model), losses(base(llama, BASES["int8"])))
    save(model, tmp_path)
    assert torch.equal(losses(load(base(llama, BASES["int8"]), tmp_path)), tuned)
