"""Packed micro-batches and LoRA's one function: equal to padding, to PEFT, and to examples alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from finetune.config.schema import FourBit, NoQuantization, Quantization
from finetune.data.batches import Batch, collate, cut
from finetune.data.render import Example
from finetune.model import fast_mlp, fast_norm
from finetune.model.attention import NAME
from finetune.model.fast_lora import install
from finetune.model.head import target_losses
from finetune.model.load import load_base
from finetune.model.packing import compiles, enable_packing, filled, is_packed, packed_inputs

LENGTHS = (70, 3, 130, 64, 1, 65)
SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 97}


def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    examples = []
    for length in LENGTHS:
        mask = (False, *(torch.rand(length - 1, generator=draw) < 0.6).tolist())
        examples.append(Example(tuple(torch.randint(0, 97, (length,), generator=draw).tolist()), mask, ""))
    return collate(examples)


def llama(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, num_key_value_heads=2, **changes)).requires_grad_(False)


def adapted(model: torch.nn.Module, **changes: object) -> torch.nn.Module:
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False, **changes)
    return get_peft_model(model, config)


def step(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients of one batch."""
    rows = batch()
    model.zero_grad()
    losses = target_losses(model, rows.ids, rows.attention, rows.supervised)
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exact_step(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same in fp64, rounded: the libraries' own fp32 gradients are off by up to 1.8e-6 here."""
    losses, gradients = step(copy.deepcopy(model).double())
    return losses.float(), {name: gradient.float() for name, gradient in gradients.items()}


def require_equal(found: tuple[torch.Tensor, dict[str, torch.Tensor]], expected: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).norm()) <= 2e-6 * max(float(gradient.norm()), 1.0), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a14_a_packed_row_gives_the_losses_and_gradients_of_padded_examples(checkpointing: bool):
    model = adapted(llama())
    model.train()
    expected = exact_step(model)
    assert enable_packing(model.get_base_model())
    assert model.get_base_model().config._attn_implementation == NAME
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    require_equal(step(model), expected)


def test_rows_that_belong_to_no_example_change_nothing():
    model = adapted(llama()).train()
    core = model.get_base_model()
    assert enable_packing(core)
    rows = batch()
    found = []
    for few in (False, True):
        model.zero_grad()
        inputs = packed_inputs(rows.ids, rows.attention, few_shapes=few)
        hidden = core.model(**inputs, use_cache=False).last_hidden_state[0, : sum(LENGTHS)]
        hidden.square().sum().backward()
        found.append((hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    assert inputs["input_ids"].shape[1] == 336 > sum(LENGTHS)
    require_equal(found[1], found[0])


def test_half_precision_on_a_cpu_knows_few_lengths():
    assert {filled(rows) for rows in range(1, 1025)} == {*range(16, 513, 16), *range(576, 1025, 64)}
    weight = torch.zeros(2)
    assert compiles(weight.bfloat16())
    assert not compiles(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiles(weight)


def test_a14_another_neighbour_changes_nothing():
    model = llama().eval()
    assert enable_packing(model)
    rows = batch()
    before = target_losses(model, rows.ids, rows.attention, rows.supervised)
    first = int(rows.supervised[0].sum())
    rows.ids[1:] = (rows.ids[1:] + 13) % 97
    after = target_losses(model, rows.ids, rows.attention, rows.supervised)
    torch.testing.assert_close(after[:first], before[:first], rtol=0, atol=1e-6)
    assert not torch.equal(after[first:], before[first:])


def test_examples_longer_than_what_is_kept_are_computed_again():
    draw = torch.Generator().manual_seed(3)
    example = Example(tuple(torch.randint(0, 97, (700,), generator=draw).tolist()), (False, *(True,) * 699), "")
    rows = collate([example, Example((5, 6, 7), (False, True, True), "")])
    gradients = []
    for packed in (False, True):
        model = adapted(llama()).train()
        assert not packed or enable_packing(model.get_base_model())
        target_losses(model, rows.ids, rows.attention, rows.supervised).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 2e-6


@pytest.mark.parametrize(
    ("config", "packs"),
    [
        (Qwen2Config(**SMALL, num_key_value_heads=2), True),
        (Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8), True),
        (GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8), True),
        (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None), True),
        (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16), False),  # a window that the probe is too short to see
        (LlamaConfig(**SMALL, num_key_value_heads=2, attention_dropout=0.1), False),
        (GPT2Config(n_embd=48, n_head=6, n_layer=2, vocab_size=97), False),  # attention dropout
        (GPT2Config(n_embd=48, n_head=6, n_layer=2, vocab_size=97, attn_pdrop=0.0), True),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'sliding_window', None)}" if not isinstance(value, bool) else "",
)
def test_packing_is_used_where_it_is_exact(config: object, packs: bool):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = batch()
    before, kind = target_losses(model, rows.ids, rows.attention, rows.supervised), model.config._attn_implementation
    assert enable_packing(model) is packs is is_packed(model)
    assert packs or model.config._attn_implementation == kind
    torch.testing.assert_close(target_losses(model, rows.ids, rows.attention, rows.supervised), before, rtol=1e-5, atol=1e-5)


def test_generation_goes_on_as_before():
    model = llama().eval()
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    attention = (ids != 0).long()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(input_ids=ids, attention_mask=attention, **options)
    assert enable_packing(model)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=attention, **options), before)


@pytest.mark.parametrize("quantization", [NoQuantization(), FourBit(method="nf4")], ids=["none", "nf4"])
def test_the_function_equals_pefts_forward_and_gradients(quantization: Quantization, tiny_model_dir: Path):
    model = adapted(load_base(tiny_model_dir, quantization, torch.float32, torch.device("cpu"))).train()
    expected = step(model)
    assert install(model) == 14
    require_equal(step(model), expected)
    with model.disable_adapter():
        rows = batch()
        off = target_losses(model, rows.ids, rows.attention, rows.supervised)
    assert not torch.equal(off, expected[0])


@pytest.mark.parametrize("quantization", [NoQuantization(), FourBit(method="nf4")], ids=["none", "nf4"])
def test_a_gated_mlp_equals_the_librarys_forward_and_gradients(quantization: Quantization, tiny_model_dir: Path):
    model = adapted(load_base(tiny_model_dir, quantization, torch.float32, torch.device("cpu"))).train()
    expected = step(model)
    install(model)
    assert fast_mlp.install(model) == 2
    require_equal(step(model), expected)
    with model.disable_adapter():
        rows = batch()
        off = target_losses(model, rows.ids, rows.attention, rows.supervised)
    assert not torch.equal(off, expected[0])


def test_a_gated_mlp_keeps_two_tensors_of_its_width_and_not_four():
    kept: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape[-1] == 64 and tensor.ndim > 1 and tensor.shape[-2] not in (4, 48))
        return tensor

    found = []
    for fast in (False, True):
        model = adapted(llama()).train()
        install(model)
        assert not fast or fast_mlp.install(model) == 2
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            rows = batch()
            target_losses(model, rows.ids, rows.attention, rows.supervised)
        found.append(sum(kept))
    assert found == [2 * 4, 2 * 2]  # two layers; the library keeps silu(g) and silu(g) * u besides


def test_mlps_of_another_kind_stay_with_the_library():
    torch.manual_seed(0)
    gelu = AutoModelForCausalLM.from_config(GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)).requires_grad_(False)
    assert fast_mlp.install(adapted(gelu)) == 0
    assert fast_mlp.install(adapted(llama(), lora_dropout=0.1)) == 0
    attention_alone = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert fast_mlp.install(attention_alone) == 0


def test_the_function_in_bf16_is_as_near_to_fp32_as_pefts():
    exact = step(adapted(llama()).train())[1]
    distances = []
    for fast in (False, True):
        model = adapted(llama().to(torch.bfloat16)).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if fast:
            install(model)
            assert fast_mlp.install(model) == 2
        with torch.autocast("cpu", torch.bfloat16):
            found = step(model)[1]
        distances.append(sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5)
    assert distances[1] < 1.1 * distances[0]


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=str)
def test_layers_that_are_not_plain_stay_with_peft(changes: dict[str, object]):
    assert install(adapted(llama(), **changes)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_as_one_function_equal_the_librarys(dtype: torch.dtype):
    model = adapted(llama().to(dtype)).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    exact = step(adapted(llama()).train())[1]
    distances = []
    for fast in (False, True):
        assert not fast or fast_norm.install(model) == 5
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = step(model)[1]
        distances.append(sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5)
    scale = sum(float(gradient.square().sum()) for gradient in exact.values()) ** 0.5
    assert distances[1] <= 1.1 * distances[0] + 2e-6 * scale


def test_norms_of_another_kind_stay_with_the_library():
    torch.manual_seed(0)
    gemma = AutoModelForCausalLM.from_config(GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)).requires_grad_(False)
    for parameter in gemma.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert fast_norm.install(gemma) == 0  # x (1 + w)
    assert fast_norm.install(llama().requires_grad_(True)) == 0  # its weight trains


def test_packed_pieces_count_no_padding():
    assert cut([10, 1, 1, 1, 1], 14) == [[0], [1, 2, 3, 4]]
    assert cut([10, 1, 1, 1, 1], 14, packed=True) == [[0, 1, 2, 3, 4]]
    assert cut([10, 3, 3], 14, packed=True) == [[0, 1], [2]]


def test_a_run_packed_and_plain_ends_alike(write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path):
    from safetensors.torch import load_file

    found = []
    for kernels in ("auto", "plain"):
        run = train_here(write_config(), f"train.kernels={kernels}", f"output={tmp_path / kernels}", "train.tokens_per_device=96")
        found.append(load_file(run / "adapter" / "adapter_model.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-4, atol=1e-5)
