"""The shapes of a model, read from its config.json: every weight it has, by name and size, without one of them being loaded.

A decoder whose blocks are all alike is a table of matrices and norms, written down here for each architecture (`model_type`) and held by
the tests against the modules that transformers builds from the same file. Names are those of the built model, since patterns in a
configuration match names. What config.json leaves out has transformers' default for the architecture, as it has when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import ConfigError
from finetune.planning.config_json import flag, optional_size, size

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
BUILTIN = "builtin:smollm2-135m"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer: y = Wx (+ b), W of (out, inputs)."""

    name: str
    """In its block, such as `self_attn.q_proj`."""
    out: int
    inputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Scalars of W."""
        return self.out * self.inputs


@dataclass(frozen=True, slots=True)
class Norm:
    """The scale of a normalization layer, (size,)."""

    name: str
    """In its block, such as `input_layernorm`."""
    size: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A causal language model of ``layers`` equal blocks between an embedding and a head, by its sizes; counts are of scalars."""

    family: str
    """`model_type` of config.json."""
    where: str
    """What the sizes were read from."""
    vocab: int
    """Rows of the embedding, which may be more than the tokenizer has tokens."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    """Width inside the MLP."""
    tied: bool
    """Whether the head is the embedding's own weight."""
    matrices: tuple[Matrix, ...]
    """Of ONE block."""
    norms: tuple[Norm, ...]
    """Of ONE block."""
    tokens: int | None = None
    """Tokens of the model's own tokenizer where that is known: new tokens are numbered from there."""

    @property
    def blocks_scalars(self) -> int:
        """In the matrices of all blocks, without biases: the part that quantization stores in fewer bits."""
        return self.layers * sum(matrix.weights for matrix in self.matrices)

    @property
    def biases_scalars(self) -> int:
        """In the biases of all blocks."""
        return self.layers * sum(matrix.out for matrix in self.matrices if matrix.bias)

    @property
    def norms_scalars(self) -> int:
        """In all normalization layers, the last one included."""
        return self.layers * sum(norm.size for norm in self.norms) + self.hidden

    @property
    def embedding_scalars(self) -> int:
        """In the embedding."""
        return self.vocab * self.hidden

    @property
    def head_scalars(self) -> int:
        """In an output head of its own; 0 where it is tied."""
        return 0 if self.tied else self.embedding_scalars

    @property
    def other_scalars(self) -> int:
        """Outside the blocks' matrices: embedding, untied head, norms, biases. Never quantized."""
        return self.embedding_scalars + self.head_scalars + self.norms_scalars + self.biases_scalars

    @property
    def total(self) -> int:
        """All parameters; a tied head counts once."""
        return self.blocks_scalars + self.other_scalars

    def modules(self) -> Iterator[tuple[str, Matrix]]:
        """Every linear layer but the head, by its full name, in the model's order."""
        for layer in range(self.layers):
            yield from ((f"model.layers.{layer}.{matrix.name}", matrix) for matrix in self.matrices)

    def parameters(self) -> Iterator[tuple[str, Shape]]:
        """Every parameter of the base by its full name, in no particular order; a tied head appears once, as the embedding."""
        yield f"{EMBEDDING}.weight", (self.vocab, self.hidden)
        for name, matrix in self.modules():
            yield f"{name}.weight", (matrix.out, matrix.inputs)
            if matrix.bias:
                yield f"{name}.bias", (matrix.out,)
        yield from ((f"{name}.weight", (size,)) for name, size in self.norm_modules())
        if not self.tied:
            yield f"{HEAD}.weight", (self.vocab, self.hidden)

    def norm_modules(self) -> Iterator[tuple[str, int]]:
        """Every normalization layer with the length of its scale."""
        for layer in range(self.layers):
            yield from ((f"model.layers.{layer}.{norm.name}", norm.size) for norm in self.norms)
        yield FINAL_NORM, self.hidden


# --- architectures -------------------------------------------------------------------------------------------------------------------

Biases = Literal["none", "stated", "qkv"]
_TWO = ("input_layernorm", "post_attention_layernorm")
_FOUR = (*_TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True, slots=True)
class _Family:
    """How the blocks of one architecture differ from Llama's, and transformers' defaults for what config.json may leave out."""

    biases: Biases = "none"
    """Of attention: `stated` in `attention_bias`, or always on `qkv`."""
    mlp_bias: bool = False
    """Whether `mlp_bias` is read."""
    norms: tuple[str, ...] = _TWO
    head_norms: Literal["none", "head", "whole"] = "none"
    """Norms of queries and keys: over each head, or over all heads at once."""
    fused: bool = False
    """One matrix for queries, keys and values, one for gate and up."""
    kv_heads: int | None = None
    """None: as many as heads."""
    head_dim: int | None = None
    """None: hidden / heads."""
    tied: bool = False


_FAMILIES: dict[str, _Family] = {
    "llama": _Family(biases="stated", mlp_bias=True),
    "mistral": _Family(kv_heads=8),
    "qwen2": _Family(biases="qkv", kv_heads=32),
    "qwen3": _Family(biases="stated", head_norms="head", kv_heads=32, head_dim=128),
    "gemma": _Family(biases="stated", kv_heads=16, head_dim=256, tied=True),
    "gemma2": _Family(biases="stated", norms=_FOUR, kv_heads=4, head_dim=256, tied=True),
    "gemma3_text": _Family(biases="stated", norms=_FOUR, head_norms="head", kv_heads=4, head_dim=256, tied=True),
    "olmo2": _Family(biases="stated", norms=("post_attention_layernorm", "post_feedforward_layernorm"), head_norms="whole"),
    "phi3": _Family(fused=True),
}
_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size", "moe_num_experts")


def known_families() -> tuple[str, ...]:
    """The architectures (`model_type`) whose shapes are known."""
    return tuple(_FAMILIES)


def read_shape(config: Mapping[str, Any], where: str, tokens: int | None = None) -> ModelShape:
    """The shape that ``config``, the content of a config.json, describes; ``where`` it was found, for messages.

    ``tokens``: of the model's tokenizer, where known. ConfigError for an architecture that is not known, and for a size that is missing or
    no positive integer.
    """
    name = config.get("model_type")
    family = _FAMILIES.get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or family is None or any(config.get(key) for key in _OF_EXPERTS):
        raise _unknown(config, where)
    hidden, inner, layers, heads, vocab = (
        size(config, key, where) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    )
    kv_heads = optional_size(config, "num_key_value_heads", family.kv_heads or heads, where)
    head_dim = optional_size(config, "head_dim", family.head_dim or hidden // heads, where)
    block = _Block(hidden, inner, heads * head_dim, kv_heads * head_dim)
    return ModelShape(
        family=name,
        where=where,
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=inner,
        tied=flag(config, "tie_word_embeddings", family.tied, where),
        matrices=_matrices(family, block, config, where),
        norms=_norms(family, block, head_dim),
        tokens=tokens,
    )


@dataclass(frozen=True, slots=True)
class _Block:
    hidden: int
    inner: int
    queries: int
    """Width of all queries."""
    keys: int
    """Width of all keys, and of all values."""


def _matrices(family: _Family, block: _Block, config: Mapping[str, Any], where: str) -> tuple[Matrix, ...]:
    stated = family.biases == "stated" and flag(config, "attention_bias", False, where)
    qkv = stated or family.biases == "qkv"
    inner = family.mlp_bias and flag(config, "mlp_bias", False, where)
    hidden = block.hidden
    if family.fused:
        return (
            Matrix("self_attn.o_proj", hidden, block.queries, stated),
            Matrix("self_attn.qkv_proj", block.queries + 2 * block.keys, hidden, qkv),
            Matrix("mlp.gate_up_proj", 2 * block.inner, hidden, inner),
            Matrix("mlp.down_proj", hidden, block.inner, inner),
        )
    return (
        Matrix("self_attn.q_proj", block.queries, hidden, qkv),
        Matrix("self_attn.k_proj", block.keys, hidden, qkv),
        Matrix("self_attn.v_proj", block.keys, hidden, qkv),
        Matrix("self_attn.o_proj", hidden, block.queries, stated),
        Matrix("mlp.gate_proj", block.inner, hidden, inner),
        Matrix("mlp.up_proj", block.inner, hidden, inner),
        Matrix("mlp.down_proj", hidden, block.inner, inner),
    )


def _norms(family: _Family, block: _Block, head_dim: int) -> tuple[Norm, ...]:
    sizes = {"none": None, "head": (head_dim, head_dim), "whole": (block.queries, block.keys)}[family.head_norms]
    of_heads = () if sizes is None else (Norm("self_attn.q_norm", sizes[0]), Norm("self_attn.k_norm", sizes[1]))
    return (*of_heads, *(Norm(name, block.hidden) for name in family.norms))


def _unknown(config: Mapping[str, Any], where: str) -> ConfigError:
    name = config.get("model_type")
    known = f"shapes are known of {', '.join(_FAMILIES)}; only the plan needs them: `finetune train` goes by the model itself"
    if not isinstance(name, str):
        return ConfigError("config.json names no architecture (`model_type`)", where=where, fix="copy the model's own config.json")
    if any(config.get(key) for key in _OF_EXPERTS):
        return ConfigError(f"{name} is a mixture of experts, whose shapes this version does not know", where=where, fix=known)
    more = ", which is more than a language model," if "text_config" in config else ""
    return ConfigError(f"the shapes of the architecture {name!r}{more} are not known", where=where, fix=known)
