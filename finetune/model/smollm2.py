"""SmolLM2-135M-Instruct from GGUF to dense bf16 safetensors with tokenizer, chat template and generation settings.

The conversion reads the file itself. transformers keeps GGUF weights packed and its result changes with its version; here two conversions
give the same bytes whatever is installed, and a test holds them against what transformers computes from the same GGUF.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.sealed import write_json, write_text

CONVERSION_VERSION = 1
"""Part of the cache key: raise it when the bytes that `convert` writes change."""

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


def convert(gguf_path: Path, directory: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer of ``gguf_path`` into ``directory``.

    Needs the package gguf (ImportError otherwise). The head is tied to the embeddings and therefore not stored.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _write_weights(reader, fields, directory / "model.safetensors")
    write_json(directory / "config.json", _model_config(fields))
    write_json(directory / "generation_config.json", _special_ids(fields))
    _write_tokenizer(fields, directory)


def tensor_name(name: str) -> str:
    """The name that transformers' Llama gives to the GGUF tensor ``name``."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, part, _ = name.split(".")  # blk.LAYER.PART.weight; the file is pinned by its sha256, so no other shape occurs
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"


def _write_weights(reader: Any, fields: dict[str, Any], path: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())  # (out, in) or (out,) float32
        count = heads.get(tensor.name.split(".")[-2])
        if count is not None:
            weight = _rotary_halves(weight, count)
        weights[tensor_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, str(path), metadata={"format": "pt"})


def _rotary_halves(weight: Any, heads: int) -> Any:
    """Undo GGUF's row order of q and k (``weight``: (heads * d, in)), which pairs neighbouring rows where Llama pairs the two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _model_config(fields: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_special_ids(fields),
        "dtype": "bfloat16",
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # GGUF keeps it as float32: 9.999999747378752e-06 is the nearest one to 1e-05.
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # The model was trained with every digit a token of its own ("smollm" in GGUF), which GGUF readers other than llama.cpp forget.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    write_text(directory / "tokenizer.json", tokenizer.to_str(pretty=False))
    write_text(directory / "chat_template.jinja", fields["tokenizer.chat_template"])
    settings = {
        "add_prefix_space": False,
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
    }
    write_text(directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
