"""What a forward pass keeps for the backward pass, counted from what each operation saves.

One token in one block of width d, with queries of width q, keys and values of width k, an MLP of width m and an adapter of rank r keeps,
where our own functions run (`finetune.model.fast`, products in a type of c bytes),

    norms           their input, d, and one number
    attention       q + 2k after rotation, the probabilities of short examples on a CPU, the output on a GPU
    layers          d for q, k and v together, q for o, d for gate and up together, and r for each of them
    MLP             2m: the outputs of gate and up

Where the libraries' arithmetic runs (dropout, DoRA, other methods, `train.kernels: plain`), every layer of a plain base keeps a copy of
its input for itself, a norm keeps one in fp32, and the MLP keeps silu(gate) and down's input besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finetune.config.methods import targets_of
from finetune.config.schema import (
    AdaLora,
    Config,
    EightBit,
    Full,
    Houlsby,
    Ia3,
    Lora,
    NoQuantization,
    Norm,
    Prefix,
    Prompt,
    SpectrumTargets,
    TiedLora,
    Tuning,
    Vera,
)
from finetune.planning.ranks import init_rank
from finetune.planning.shapes import Matrix, ModelShape
from finetune.planning.targets import find_named, in_mlp

CAPPED = ("gemma2",)
"""Families that bend their logits, which are therefore computed again in the backward pass."""
_WINDOWED = ("gemma2", "gemma3_text")
"""Families whose attention has a window or a cap: they are padded, not packed."""
_FP32 = 4
_MASK = {"cuda": 1, "cpu": _FP32}
"""Bytes of a scalar of dropout's mask: a boolean, or a number of the adapter's type."""
_TILE, _SHORT = 64, 256
"""Of attention on a CPU: rows of queries attended together, and the longest example whose probabilities are kept."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How the blocks of a run compute: what decides which tensors are saved."""

    kind: Literal["cpu", "cuda"]
    product: int
    """Bytes of a scalar in products: autocast's type."""
    stream: int
    """Bytes of a scalar of the residual stream."""
    own_layers: bool
    """LoRA layers are one function."""
    own_norms: bool
    own_mlp: bool
    packed: bool
    """Examples are laid end to end, and attention is ours."""
    shares_inputs: bool
    """Whether the layers that read one tensor keep it once, although the libraries compute them."""
    dropout: bool
    shares: Mapping[str, float]
    """By the name of a matrix: share of the blocks in which it is adapted or trained, and so must keep its input."""


def arithmetic(shape: ModelShape, config: Config, kind: Literal["cpu", "cuda"], product: int, storage: int) -> Arithmetic:
    """What `finetune.model.fast.accelerate` will find; ``product`` and ``storage`` are bytes of a scalar in products and in the base."""
    tuning = config.tuning
    auto = config.train.kernels == "auto"
    dropout = bool(getattr(tuning, "dropout", 0.0))
    plain = isinstance(tuning, Lora | TiedLora) and not dropout and not (isinstance(tuning, Lora) and tuning.dora)
    shares = _shares(tuning, shape)
    own = auto and plain and not isinstance(config.quantization, EightBit)
    wide = config.train.trainable_dtype == "fp32" and _trains_embeddings(tuning)
    gemma = shape.family.startswith("gemma")  # norms scale by 1 + w, and gates are GELUs
    return Arithmetic(
        kind=kind,
        product=product,
        stream=_FP32 if wide else storage,
        own_layers=own,
        own_norms=auto and not gemma and not wide and not isinstance(tuning, Full | Norm),
        own_mlp=own and not gemma and all(shares[matrix.name] == 1.0 for matrix in shape.matrices if in_mlp(matrix.name)),
        packed=auto and shape.family not in _WINDOWED and not isinstance(tuning, Prompt | Prefix),
        # PEFT's quantized layers leave the cast to autocast, and ask only for a GPU's
        shares_inputs=own or product == _FP32 or (kind == "cuda" and not isinstance(config.quantization, NoQuantization)),
        dropout=dropout,
        shares=shares,
    )


def _trains_embeddings(tuning: Tuning) -> bool:
    """Whether the embeddings that the blocks read are the trained, wider ones."""
    if isinstance(tuning, Full):
        return not isinstance(tuning.targets, SpectrumTargets)
    return isinstance(tuning, Lora) and tuning.embeddings == "full"


def _shares(tuning: Tuning, shape: ModelShape) -> dict[str, float]:
    if isinstance(tuning, Full):
        part = tuning.targets.spectrum if isinstance(tuning.targets, SpectrumTargets) else 1.0
        return {matrix.name: part for matrix in shape.matrices}
    targets = targets_of(tuning)
    if targets is None:
        return {matrix.name: 0.0 for matrix in shape.matrices}
    if isinstance(targets, SpectrumTargets):
        return {matrix.name: targets.spectrum for matrix in shape.matrices}
    counts = Counter(name.split(".", 3)[3] for name in find_named([name for name, _ in shape.modules()], targets))
    return {matrix.name: counts[matrix.name] / shape.layers for matrix in shape.matrices}


# --- one block -----------------------------------------------------------------------------------------------------------------------


def kept(shape: ModelShape, config: Config, how: Arithmetic, example_tokens: int) -> float:
    """Bytes that one token keeps in one block, in a micro-batch of examples of ``example_tokens``."""
    return _norms(shape, config, how) + _inputs(shape, config, how) + _attention(shape, how, example_tokens) + _extras(shape, config, how)


def _norms(shape: ModelShape, config: Config, how: Arithmetic) -> float:
    """Inputs of the norms, which are the residual stream wherever nothing else is normalized."""
    total = 0.0
    heads = {"self_attn.q_norm": shape.heads * shape.head_dim, "self_attn.k_norm": shape.kv_heads * shape.head_dim}
    for norm in shape.norms:
        size = heads.get(norm.name, shape.hidden)
        total += size * how.stream + _FP32
        if not how.own_norms and how.stream < _FP32:
            total += size * _FP32
        if isinstance(config.tuning, Full | Norm):  # what the scale multiplies, for the scale's own gradient
            total += size * how.stream
    return total


def _inputs(shape: ModelShape, config: Config, how: Arithmetic) -> float:
    """Inputs of the layers that are adapted or trained, and the r numbers between A and B."""
    tuning = config.tuning
    total = 0.0
    shared: dict[str, float] = {}
    rank = init_rank(tuning) if isinstance(tuning, AdaLora) else tuning.rank if isinstance(tuning, Lora | TiedLora) else 0
    for matrix in shape.matrices:
        part = how.shares[matrix.name]
        if isinstance(tuning, Vera):  # A and B do not train: what the two vectors multiply is kept, not the input
            total += part * (tuning.rank + matrix.out) * how.product
            continue
        total += part * rank * how.product
        if isinstance(tuning, Lora) and tuning.dora:
            total += part * 2 * matrix.out * how.product
        if how.own_mlp and matrix.name == "mlp.down_proj":
            continue
        if how.dropout:
            total += part * matrix.inputs * (how.product + _MASK[how.kind])  # what was dropped out of, and the mask
        elif how.shares_inputs:
            key = _reads(matrix)
            shared[key] = max(shared.get(key, 0.0), part * matrix.inputs * how.product)
        else:
            total += part * matrix.inputs * how.product
    return total + sum(shared.values())


def _reads(matrix: Matrix) -> str:
    """The tensor that ``matrix`` multiplies, by a name that its readers share."""
    part = matrix.name.rpartition(".")[2]
    return {"o_proj": "attended", "down_proj": "gated"}.get(part, "mlp" if in_mlp(matrix.name) else "attention")


def _attention(shape: ModelShape, how: Arithmetic, example_tokens: int) -> float:
    """Queries, keys and values, and what the softmax leaves."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if not how.packed:
        keys = queries  # the libraries repeat keys and values for every head that reads them
    total = float((queries + 2 * keys) * how.product)
    if how.kind == "cpu" and how.packed:
        return total + probabilities(shape, how, example_tokens)
    output = 0 if how.shares_inputs and not how.dropout else queries * how.product  # else o's input is the very tensor
    return total + output + shape.heads * _FP32


def probabilities(shape: ModelShape, how: Arithmetic, example_tokens: int) -> float:
    """Bytes a token of one block's attention, a tensor for each tile: kept by our own attention on a CPU where examples are short."""
    if how.kind != "cpu" or not how.packed or example_tokens > _SHORT:
        return 0.0
    tiles = -(-example_tokens // _TILE)
    return shape.heads * _TILE**2 * tiles * (tiles + 1) / 2 / example_tokens * how.product


def _extras(shape: ModelShape, config: Config, how: Arithmetic) -> float:
    """The MLP between its layers, and what a method puts between those."""
    total = float((2 if how.own_mlp else 3) * shape.inner * how.product)
    match config.tuning:
        case Ia3():
            return total + (2 * shape.kv_heads * shape.head_dim + shape.inner) * _FP32
        case Houlsby() as tuning:
            return total + (2 if tuning.placement == "both" else 1) * (shape.hidden + 2 * tuning.bottleneck) * how.product
    return total


def work(shape: ModelShape, how: Arithmetic) -> float:
    """Bytes a token that the widest moment of one block's backward pass takes besides what is kept: its MLP, or its attention."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    mlp = (3 * shape.inner + 3 * shape.hidden) * how.product
    if not how.own_layers and not how.shares_inputs:
        mlp += 2 * shape.inner * _FP32  # the libraries cast inputs and gradients to the adapter's type
    return max(mlp, (4 * queries + 6 * keys + shape.hidden) * how.product)


def outside(shape: ModelShape, how: Arithmetic) -> float:
    """Bytes a token outside the blocks: the last norm's input and output, what the head reads, and its gradient; rotations."""
    return shape.hidden * (how.stream + 3 * how.product) + 2 * shape.head_dim * how.product
