"""Every tensor that a method trains, by its name in the model and its shape: `finetune.model.adapters.attach`, from shapes alone.

One function a method. Names are those of the built model, with what PEFT puts around a module's own, so that patterns of learning-rate
groups mean the same here and in training. The tests hold every table to the model that is really built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import assert_never

from finetune.config.schema import (
    AdaLora,
    Bitfit,
    Full,
    Houlsby,
    Ia3,
    Lora,
    Norm,
    Prefix,
    Prompt,
    SpectrumTargets,
    Targets,
    TiedLora,
    Tuning,
    Vera,
)
from finetune.errors import ConfigError
from finetune.planning.ranks import init_rank, strengths
from finetune.planning.shapes import EMBEDDING, HEAD, Matrix, ModelShape, Shape
from finetune.planning.targets import chosen, find_named, kind_of, scaled_by_ia3

_PEFT = "base_model.model."
_ADAPTER = "default"

Named = Iterator[tuple[str, Shape]]


@dataclass(frozen=True, slots=True)
class Base:
    """A base model whose embedding may have got rows for new tokens."""

    shape: ModelShape
    new_tokens: int = 0

    @property
    def rows(self) -> int:
        """Of the embedding, and of an untied head. A tokenizer of unknown length is taken to fill the embedding."""
        shape = self.shape
        first = shape.vocab if shape.tokens is None else shape.tokens
        return max(shape.vocab, first + self.new_tokens) if self.new_tokens else shape.vocab


def trained_tensors(base: Base, tuning: Tuning) -> dict[str, Shape]:
    """The shapes of all that ``tuning`` trains on ``base``, by name; what several layers share appears once, under its first name.

    Where Spectrum chooses the layers, the first ones stand for those it will choose: shapes are the same in all. ConfigError where nothing
    of the model fits the method, and where a target or a pattern matches nothing.
    """
    match tuning:
        case Lora() | TiedLora() | AdaLora() | Vera():
            found = _on_modules(base, tuning)
        case Full():
            found = _whole(base, tuning)
        case _:
            found = _everywhere(base.shape, tuning)
    return dict(found)


def _on_modules(base: Base, tuning: Lora | TiedLora | AdaLora | Vera) -> Named:
    """The methods that have targets."""
    match tuning:
        case Lora():
            return _lora(base, tuning)
        case TiedLora():
            return _tied(base.shape, tuning)
        case AdaLora():
            return _adalora(base.shape, tuning)
        case Vera():
            return _vera(base.shape, tuning)
    assert_never(tuning)


def _everywhere(shape: ModelShape, tuning: Ia3 | Prompt | Prefix | Norm | Bitfit | Houlsby) -> Named:
    """The methods that know themselves where they go."""
    match tuning:
        case Ia3():
            return _ia3(shape)
        case Prompt():
            return _virtual((tuning.tokens, shape.hidden))
        case Prefix():
            return _virtual((tuning.tokens, 2 * shape.layers * shape.kv_heads * shape.head_dim))
        case Norm():
            return ((f"{_PEFT}{name}.ln_tuning_layers.{_ADAPTER}.weight", (size,)) for name, size in shape.norm_modules())
        case Bitfit():
            return _biases(shape)
        case Houlsby():
            return _bottlenecks(shape, tuning)
    assert_never(tuning)


def find_modules(shape: ModelShape, targets: Targets) -> dict[str, Matrix]:
    """The linear layers that ``targets`` means, by name; of those that Spectrum chooses, as many, and the first ones."""
    modules = dict(shape.modules())
    if isinstance(targets, SpectrumTargets):
        names = chosen(dict.fromkeys(modules, 0.0), targets.spectrum)
    else:
        names = find_named(list(modules), targets)
    return {name: modules[name] for name in names}


def _lora(base: Base, tuning: Lora) -> Named:
    shape = base.shape
    # patterns are looked up among all that Spectrum may choose: one that decides for no stand-in may still decide
    possible = list(dict(shape.modules())) if isinstance(tuning.targets, SpectrumTargets) else list(find_modules(shape, tuning.targets))
    embedded = [EMBEDDING] if tuning.embeddings == "lora" else []
    ranks = strengths([*possible, *embedded], tuning)
    for name, matrix in find_modules(shape, tuning.targets).items():
        rank = ranks[name].rank
        yield f"{_PEFT}{name}.lora_A.{_ADAPTER}.weight", (rank, matrix.inputs)
        yield f"{_PEFT}{name}.lora_B.{_ADAPTER}.weight", (matrix.out, rank)
        if tuning.dora:
            yield f"{_PEFT}{name}.lora_magnitude_vector.{_ADAPTER}.weight", (matrix.out,)
    if embedded:
        rank = ranks[EMBEDDING].rank
        yield f"{_PEFT}{EMBEDDING}.lora_embedding_A.{_ADAPTER}", (rank, base.rows)
        yield f"{_PEFT}{EMBEDDING}.lora_embedding_B.{_ADAPTER}", (shape.hidden, rank)
        if tuning.dora:
            yield f"{_PEFT}{EMBEDDING}.lora_magnitude_vector.{_ADAPTER}.weight", (shape.hidden,)
    yield from _embeddings(base, tuning)


def _embeddings(base: Base, tuning: Lora) -> Named:
    """What trains of embedding and head as a whole, or by rows; a tied head is the embedding's own parameter."""
    shape = base.shape
    rows = (base.new_tokens, shape.hidden)
    if tuning.embeddings == "full":
        yield f"{_PEFT}{EMBEDDING}.modules_to_save.{_ADAPTER}.weight", (base.rows, shape.hidden)
    if tuning.embeddings == "new-tokens":
        if not base.new_tokens:
            raise ConfigError("there are no new tokens to train", where="tuning.embeddings", fix="list them in model.new_tokens")
        yield f"{_PEFT}{EMBEDDING}.token_adapter.trainable_tokens_delta.{_ADAPTER}", rows
    if tuning.embeddings in ("full", "new-tokens") and base.new_tokens and not shape.tied:
        yield f"{_PEFT}{HEAD}.token_adapter.trainable_tokens_delta.{_ADAPTER}", rows


def _tied(shape: ModelShape, tuning: TiedLora) -> Named:
    """Layers of one type share A (or B) where its shape is the same."""
    seen: set[tuple[str, Shape]] = set()
    for name, matrix in find_modules(shape, tuning.targets).items():
        factors = {"a": (tuning.rank, matrix.inputs), "b": (matrix.out, tuning.rank)}
        for side, sides in factors.items():
            if side == tuning.share:
                if (kind_of(name), sides) in seen:
                    continue
                seen.add((kind_of(name), sides))
            yield f"{_PEFT}{name}.lora_{side.upper()}.{_ADAPTER}.weight", sides


def _adalora(shape: ModelShape, tuning: AdaLora) -> Named:
    rank = init_rank(tuning)
    for name, matrix in find_modules(shape, tuning.targets).items():
        yield f"{_PEFT}{name}.lora_A.{_ADAPTER}", (rank, matrix.inputs)
        yield f"{_PEFT}{name}.lora_E.{_ADAPTER}", (rank, 1)
        yield f"{_PEFT}{name}.lora_B.{_ADAPTER}", (matrix.out, rank)


def _vera(shape: ModelShape, tuning: Vera) -> Named:
    for name, matrix in find_modules(shape, tuning.targets).items():
        yield f"{_PEFT}{name}.vera_lambda_b.{_ADAPTER}", (matrix.out,)
        yield f"{_PEFT}{name}.vera_lambda_d.{_ADAPTER}", (tuning.rank,)


def _ia3(shape: ModelShape) -> Named:
    modules = dict(shape.modules())
    attention, inner = scaled_by_ia3(list(modules))
    for name in attention:
        yield f"{_PEFT}{name}.ia3_l.{_ADAPTER}", (modules[name].out, 1)
    for name in inner:
        yield f"{_PEFT}{name}.ia3_l.{_ADAPTER}", (1, modules[name].inputs)


def _virtual(sides: Shape) -> Named:
    yield f"prompt_encoder.{_ADAPTER}.embedding.weight", sides


def _biases(shape: ModelShape) -> Named:
    found = [(f"{name}.bitfit.bias", (matrix.out,)) for name, matrix in shape.modules() if matrix.bias]
    if not found:
        raise ConfigError(
            "this model has no biases to train",
            where="tuning.method",
            fix=f"use `method: norm`, which trains the scales of its normalization layers ({shape.norms_scalars:,} parameters)",
        )
    yield from found


def _bottlenecks(shape: ModelShape, tuning: Houlsby) -> Named:
    width, hidden = tuning.bottleneck, shape.hidden
    for layer in range(shape.layers):
        for sublayer in ("self_attn", "mlp") if tuning.placement == "both" else ("mlp",):
            part = f"model.layers.{layer}.{sublayer}.houlsby"
            yield f"{part}.down.weight", (width, hidden)
            yield f"{part}.down.bias", (width,)
            yield f"{part}.up.weight", (hidden, width)
            yield f"{part}.up.bias", (hidden,)


def _whole(base: Base, tuning: Full) -> Named:
    if isinstance(tuning.targets, SpectrumTargets):
        yield from ((f"{name}.weight", (matrix.out, matrix.inputs)) for name, matrix in find_modules(base.shape, tuning.targets).items())
        return
    enlarged = (base.rows, base.shape.hidden)
    for name, sides in base.shape.parameters():
        yield name, enlarged if name in (f"{EMBEDDING}.weight", f"{HEAD}.weight") else sides


def buffers(base: Base, tuning: Tuning) -> Mapping[str, Shape]:
    """Tensors that a method keeps and never trains, and that are no parameters: VeRA's random matrices, one pair for all modules."""
    if not isinstance(tuning, Vera):
        return {}
    modules = find_modules(base.shape, tuning.targets).values()
    widest, tallest = max(matrix.inputs for matrix in modules), max(matrix.out for matrix in modules)
    return {"vera_A": (tuning.rank, widest), "vera_B": (tallest, tuning.rank)}
