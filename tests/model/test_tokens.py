"""New tokens and trained embeddings: the same rows in training, saving and reloading, and tied heads that stay tied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import load_file
from torch import Tensor

from finetune.config.schema import FourBit, Lora, NoQuantization
from finetune.errors import ConfigError, VerificationError
from finetune.model.adapters import WEIGHTS, attach, load, save, trainable
from finetune.model.head import target_losses
from finetune.model.load import load_base, load_tokenizer, require_vocabulary
from finetune.model.methods import Given
from finetune.model.tokens import add_tokens, enlarge, enlarged, is_tied, token_ids

CPU, FP32 = torch.device("cpu"), torch.float32
TINY = 320
"""Tokens of the tiny model, and rows of its embedding."""
NEW = ("[<note>]", "[<dose>]")
IDS = (TINY, TINY + 1)
ROWS = torch.tensor([[5, 320, 17, 321, 9, 320], [321, 8, 30, 4, 320, 6]])
Make = Callable[..., Path]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tiny(make_tiny_model: Make, request: pytest.FixtureRequest) -> Path:
    return make_tiny_model(tied=request.param, initializer_range=0.2)


def base_of(directory: Path, dtype: torch.dtype = FP32, quantization: Any = None) -> Any:
    model = load_base(directory, quantization or NoQuantization(), dtype, CPU)
    enlarge(model, IDS)
    return model


def attached(directory: Path, embeddings: Any, dtype: torch.dtype = FP32, quantization: Any = None) -> Any:
    torch.manual_seed(0)
    tuning = Lora(method="lora", rank=4, embeddings=embeddings)
    return attach(base_of(directory, dtype, quantization), tuning, Given(new_ids=IDS))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=ROWS).logits.float()


def step(model: Any, rate: float = 0.5) -> dict[str, Tensor]:
    """One step of gradient descent; returns the gradients."""
    half = model.get_input_embeddings().weight.dtype == torch.bfloat16 or model.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        target_losses(model.train(), ROWS, torch.ones_like(ROWS), torch.ones_like(ROWS, dtype=torch.bool)).mean().backward()
    gradients = {}
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
        parameter.data -= rate * parameter.grad
        parameter.grad = None
    model.eval()
    return gradients


# --- tokenizer -----------------------------------------------------------------------------------------------------------------------


def test_new_tokens_stand_behind_the_own_ones_and_survive_saving(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny, NEW)
    assert len(tokenizer) == TINY + 2
    assert token_ids(tokenizer, NEW) == IDS
    text = "take [<dose>]twice[<note>] Doctors"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert [id_ for id_ in ids if id_ in IDS] == [321, 320]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert token_ids(again, NEW) == IDS
    assert again(text, add_special_tokens=False).input_ids == ids


def test_tokens_that_exist_are_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError) as found:
        load_tokenizer(tiny, ("<|im_end|>", "[<note>]", "[<note>]"))
    assert "is a token of the model already" in str(found.value)
    assert "listed twice" in str(found.value)
    with pytest.raises(VerificationError, match="not the last"):
        token_ids(load_tokenizer(tiny), NEW)
    assert add_tokens(load_tokenizer(tiny), ()) == ()


# --- rows ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [NoQuantization(), FourBit(method="nf4")], ids=["plain", "nf4"])
def test_a8_new_rows_are_the_mean_on_every_loading(tiny: Path, dtype: torch.dtype, quantization: Any) -> None:
    plain = load_base(tiny, quantization, dtype, CPU)
    tied, before = is_tied(plain), plain.get_input_embeddings().weight.clone()
    torch.manual_seed(1)
    model = base_of(tiny, dtype, quantization)
    torch.manual_seed(2)
    again = base_of(tiny, dtype, quantization)
    assert is_tied(model) == tied
    for side in ("get_input_embeddings", "get_output_embeddings"):
        weight = getattr(model, side)().weight
        own = getattr(plain, side)().weight
        assert weight.shape == (TINY + 2, 64)
        assert weight.dtype == dtype
        assert not weight.requires_grad
        assert torch.equal(weight[:TINY], own)
        assert torch.equal(weight[TINY], own.double().mean(dim=0).to(dtype))
        assert torch.equal(weight, getattr(again, side)().weight)
        assert torch.equal(weight, enlarged(own, IDS))
    assert torch.equal(plain.get_input_embeddings().weight, before)
    assert model.config.vocab_size == TINY + 2
    require_vocabulary(load_tokenizer(tiny, NEW), model)


def test_a8_spare_rows_are_used_and_those_beyond_kept(make_tiny_model: Make) -> None:
    weight = load_base(make_tiny_model(vocab_size=384), NoQuantization(), FP32, CPU).get_input_embeddings().weight
    grown = enlarged(weight, IDS)
    assert grown.shape == weight.shape
    assert torch.equal(grown[320], weight[:320].double().mean(dim=0).float())
    assert torch.equal(grown[320], grown[321])
    assert torch.equal(grown[322:], weight[322:])
    assert torch.equal(grown[:320], weight[:320])
    assert enlarged(weight, ()) is weight
    with pytest.raises(VerificationError, match="has none for the tokens below"):
        enlarged(weight[:100], IDS)


# --- training them -------------------------------------------------------------------------------------------------------------------


def test_new_tokens_train_their_rows_alone_and_a_tied_head_follows(tiny: Path) -> None:
    model = attached(tiny, "new-tokens")
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = base.config.tie_word_embeddings
    rows = [name for name in trainable(model) if "trainable_tokens_delta" in name]
    assert len(rows) == (1 if tied else 2)
    assert all(trainable(model)[name].shape == (2, 64) for name in rows)
    frozen = embedding.token_adapter.base_layer.weight.clone()
    start = logits(model)
    torch.testing.assert_close(start, logits(base_of(tiny)), rtol=0, atol=1e-5)
    gradients = step(model)
    assert all(gradients[name].any() for name in rows)
    assert torch.equal(embedding.token_adapter.base_layer.weight, frozen)
    assert isinstance(head, TrainableTokensWrapper)
    with torch.no_grad():
        merged = embedding.token_adapter.get_merged_weights(["default"])
        assert torch.equal(merged[:TINY], frozen[:TINY])
        assert not torch.equal(merged[TINY:], frozen[TINY:])
        hidden = torch.eye(64)[:3]
        assert torch.equal(head(hidden), hidden @ head.token_adapter.get_merged_weights(["default"]).T)
        if tied:
            assert torch.equal(head.token_adapter.get_merged_weights(["default"]), merged)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_of(tiny)))


def test_full_embeddings_train_every_row_and_a_tied_head_is_the_same_parameter(tiny: Path) -> None:
    model = attached(tiny, "full")
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = [name for name in trainable(model) if "lora_" not in name]
    if base.config.tie_word_embeddings:
        assert len(names) == 1
        assert head.modules_to_save["default"].weight is embedding.modules_to_save["default"].weight
    else:
        assert {name.rpartition("lm_head")[1] for name in names} == {"", "lm_head"}  # the new tokens' rows of the head train too
    start = logits(model)
    torch.testing.assert_close(start, logits(base_of(tiny)), rtol=0, atol=1e-5)
    step(model)
    copy = embedding.modules_to_save["default"].weight
    assert (copy - base_of(tiny).get_input_embeddings().weight).any(dim=1).sum() > 6
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_of(tiny)))


def test_the_gradient_of_a_tied_embedding_is_that_of_full_tuning(make_tiny_model: Make) -> None:
    directory = make_tiny_model(initializer_range=0.2)
    gradients = step(attached(directory, "full"))
    whole = base_of(directory)
    whole.get_input_embeddings().weight.requires_grad_(True)
    expected = step(whole)
    (name,) = [name for name in gradients if "lora_" not in name]
    torch.testing.assert_close(gradients[name], expected["model.embed_tokens.weight"], rtol=1e-4, atol=1e-6)
    rows = step(attached(directory, "new-tokens"))
    (name,) = [name for name in rows if "lora_" not in name]
    torch.testing.assert_close(rows[name], expected["model.embed_tokens.weight"][TINY:], rtol=1e-4, atol=1e-6)


def test_a_low_rank_update_of_a_tied_embedding_does_not_reach_the_head(make_tiny_model: Make) -> None:
    directory = make_tiny_model(initializer_range=0.2)
    model = attach(load_base(directory, NoQuantization(), FP32, CPU), Lora(method="lora", rank=4, embeddings="lora"))
    base = model.get_base_model()
    hidden = torch.randn(3, 64)
    before = base.get_output_embeddings()(hidden)
    base.model.embed_tokens.lora_embedding_B["default"].data.normal_()
    assert torch.equal(base.get_output_embeddings()(hidden), before)


@pytest.mark.parametrize("embeddings", ["new-tokens", "full"])
@pytest.mark.parametrize("quantization", [NoQuantization(), FourBit(method="nf4")], ids=["bf16", "nf4"])
def test_a8_a12_saved_rows_are_fp32_and_reload_exactly(tiny: Path, tmp_path: Path, embeddings: Any, quantization: Any) -> None:
    model = attached(tiny, embeddings, torch.bfloat16, quantization)
    assert {parameter.dtype for parameter in trainable(model).values()} == {FP32}
    step(model, 0.01)
    save(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {FP32}
    tied = model.get_base_model().config.tie_word_embeddings
    kept = {name.removeprefix("base_model.model.") for name in stored if "lora_" not in name}
    deltas = {f"{name}.token_adapter.trainable_tokens_delta" for name in ("model.embed_tokens", "lm_head")}
    if embeddings == "new-tokens":
        assert kept == {name for name in deltas if not tied or "lm_head" not in name}
    else:
        head = "lm_head.weight" if tied else "lm_head.token_adapter.trainable_tokens_delta"
        assert kept == {"model.embed_tokens.weight", head}
    loaded = load(base_of(tiny, torch.bfloat16, quantization), tmp_path).eval()
    again = dict(loaded.named_parameters())
    for name, parameter in trainable(model).items():
        assert again[name].dtype == FP32, name
        assert torch.equal(again[name], parameter), name
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(VerificationError), torch.no_grad():
        load(load_base(tiny, quantization, torch.bfloat16, CPU), tmp_path)  # a base without rows for them


@pytest.mark.parametrize("embeddings", ["new-tokens", "full"])
def test_plain_peft_reads_the_same_model(tiny: Path, tmp_path: Path, embeddings: Any) -> None:
    model = attached(tiny, embeddings)
    step(model)
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(base_of(tiny), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_new_tokens_without_any_are_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="no new tokens to train"):
        attach(load_base(tiny, NoQuantization(), FP32, CPU), Lora(method="lora", embeddings="new-tokens"))
