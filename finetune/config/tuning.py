"""What trains: one section a method, each with its own fields only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from finetune.config.section import Count, Fraction, Positive, Section

Rank = Annotated[int, Field(ge=1, le=4096)]

# --- how adapters start --------------------------------------------------------------------------------------------------------------


class DefaultInit(Section):
    """A drawn Kaiming-uniform, B zero: the adapter starts as nothing."""

    method: Literal["default"] = "default"


class GaussianInit(Section):
    """A drawn from a normal distribution of standard deviation 1/r, B zero."""

    method: Literal["gaussian"]


class OrthogonalInit(Section):
    """A and B drawn, both other than zero, from orthogonal halves of the r inner directions, so that BA starts at zero."""

    method: Literal["orthogonal"]


class LoftqInit(Section):
    """The adapter starts as the best rank-r correction of the quantization error (LoftQ, 2310.08659), scaled for alpha and rank."""

    method: Literal["loftq"]
    iterations: Annotated[int, Field(ge=1, le=10)] = 1
    """Alternations of quantization and SVD. 1 leaves the base a plain quantization of the original; more reduce the error further."""
    exact: bool = False
    """Full SVD even where a randomized one (at most 0.6 % more error) would serve; slower on large matrices."""


class PissaInit(Section):
    """The adapter starts as the r largest singular directions of the weight, which leave the base (PiSSA, 2404.02948). The finished
    adapter is exported as a plain one of rank 2r on the untouched base."""

    method: Literal["pissa"]
    exact: bool = False
    """Full SVD even where a randomized one would serve; slower on large matrices."""


class OloraInit(Section):
    """The adapter starts from the QR factors of the weight, which leave the base (OLoRA, 2406.01775). Exported as PiSSA is."""

    method: Literal["olora"]


class EvaInit(Section):
    """A starts as the main directions of each layer's inputs on the training data, B zero (EVA, 2410.07170). The base stays as it is."""

    method: Literal["eva"]
    rows: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Training rows whose activations are looked at."""


Init = Annotated[DefaultInit | GaussianInit | OrthogonalInit | LoftqInit | PissaInit | OloraInit | EvaInit, Field(discriminator="method")]

# --- where adapters go ---------------------------------------------------------------------------------------------------------------


class RegexTargets(Section):
    """Every linear module whose full name matches."""

    regex: Annotated[str, Field(min_length=1)]
    """A Python regular expression over full module names, such as `layers\\.(2[0-9])\\..*_proj`."""


class SpectrumTargets(Section):
    """The layers with the highest signal-to-noise ratio of each module type (Spectrum, 2406.06623)."""

    spectrum: Annotated[float, Field(gt=0.0, le=1.0)]
    """Share of the layers of each module type that is chosen: 0.5 takes the better half of the q_proj, of the k_proj, and so on."""


def _targets_kind(value: object) -> str:
    if isinstance(value, str):
        return "keyword"
    if isinstance(value, (list, tuple)):
        return "names"
    spectrum = "spectrum" in value if isinstance(value, dict) else isinstance(value, SpectrumTargets)
    return "spectrum" if spectrum else "regex"


Targets = Annotated[
    Annotated[Literal["attention", "mlp", "all-linear"], Tag("keyword")]
    | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), Tag("names")]
    | Annotated[RegexTargets, Tag("regex")]
    | Annotated[SpectrumTargets, Tag("spectrum")],
    Discriminator(_targets_kind),
]


def _whole_or_part(value: object) -> str:
    return "keyword" if isinstance(value, str) else "spectrum"


# --- methods -------------------------------------------------------------------------------------------------------------------------


class Lora(Section):
    """Low-rank adaptation (2106.09685) and its variants: h = Wx + s BAx."""

    method: Literal["lora"]
    rank: Rank = 16
    """Rank r of the update. 4-8 for style, 16 for instructions, 32-64 for a domain, 64-256 for new knowledge."""
    alpha: Positive = 16.0
    """Numerator of the scale s. With rslora, alpha = rank gives s = sqrt(rank)."""
    scaling: Literal["lora", "rslora"] = "lora"
    """`lora`: s = alpha/r. `rslora`: s = alpha/sqrt(r) (2312.03732), which keeps gradients alive at rank 64 and above."""
    rank_pattern: dict[str, Rank] = {}
    """Another rank for the target modules whose full name matches a regular expression: `{'layers\\.0\\.': 8}`. The first match wins."""
    alpha_pattern: dict[str, Positive] = {}
    """Another alpha for the target modules whose full name matches a regular expression. The first match wins."""
    init: Init = DefaultInit()
    """How A and B start. `loftq` needs a quantized base, `pissa` and `olora` an unquantized one."""
    dora: bool = False
    """Train a magnitude for each output row beside the direction (DoRA, 2402.09353). Better at low ranks, about a third slower."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input. 0.05-0.1 below 10k examples, 0 for large or knowledge-heavy data."""
    targets: Targets = "all-linear"
    """Modules that get an adapter: `attention`, `mlp`, `all-linear`, a list of names (`[q_proj, v_proj]`), `{regex: ...}`, or
    `{spectrum: 0.5}`."""
    embeddings: Literal["frozen", "lora", "full", "new-tokens"] = "frozen"
    """Whether the input embeddings train. `lora` for a domain with its own vocabulary; `full` stores a whole copy of them; `new-tokens`
    trains the rows of `model.new_tokens` alone. A tied output head follows `full` and `new-tokens`; with `lora` it stays the base's."""


class TiedLora(Section):
    """LoRA whose A (or B) is one matrix for all layers of a module type (after 2311.09578). Exported as a plain LoRA."""

    method: Literal["tied-lora"]
    rank: Rank = 16
    """Rank r of the update."""
    alpha: Positive = 16.0
    """Numerator of the scale s."""
    scaling: Literal["lora", "rslora"] = "lora"
    """`lora`: s = alpha/r. `rslora`: s = alpha/sqrt(r)."""
    share: Literal["a", "b"] = "a"
    """Which of the two factors is shared over the layers."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    targets: Targets = "all-linear"
    """Modules that get an adapter, as for `lora`."""


class AdaLora(Section):
    """LoRA as P Lambda Q, whose least important singular values are pruned while it trains (AdaLoRA, 2303.10512)."""

    method: Literal["adalora"]
    rank: Rank = 8
    """Mean rank of a module at the end."""
    init_rank: Rank | None = None
    """Rank of every module at the start; null: one and a half times `rank`."""
    alpha: Positive = 16.0
    """Numerator of the scale s = alpha/rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    targets: Targets = "all-linear"
    """Modules that get an adapter, as for `lora`."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps before the first pruning."""
    final_ratio: Fraction = 0.3
    """Share of the steps after the last pruning."""
    every_steps: Count = 10
    """Optimizer steps between two prunings."""
    orthogonality: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the penalty that keeps P and Q orthogonal, in the loss."""


class Vera(Section):
    """Two trained vectors a module around random matrices that all layers share (VeRA, 2310.11454)."""

    method: Literal["vera"]
    rank: Rank = 256
    """Rows of the shared random A."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    d_initial: Positive = 0.1
    """Start of the inner vector d; the outer one, b, starts at zero."""
    targets: Targets = "all-linear"
    """Modules that get an adapter, as for `lora`."""


class Ia3(Section):
    """Learned scales on keys, values and the inner activation of the MLP (IA3, 2205.05638)."""

    method: Literal["ia3"]


class Prompt(Section):
    """Trained embeddings before the input (prompt tuning, 2104.08691). Cannot be merged."""

    method: Literal["prompt"]
    tokens: Annotated[int, Field(ge=1, le=1024)] = 20
    """Virtual tokens."""
    text: Annotated[str, Field(min_length=1)] | None = None
    """Text whose embeddings they start as; null: drawn at random."""


class Prefix(Section):
    """Trained keys and values before those of each layer (prefix tuning, 2101.00190). Cannot be merged."""

    method: Literal["prefix"]
    tokens: Annotated[int, Field(ge=1, le=1024)] = 20
    """Virtual tokens."""


class Norm(Section):
    """The scales of the normalization layers alone train."""

    method: Literal["norm"]


class Bitfit(Section):
    """The biases alone train (BitFit, 2106.10199). Llama and its like have none: there `norm` is the nearest."""

    method: Literal["bitfit"]


class Houlsby(Section):
    """Bottleneck layers between the sublayers of each block (1902.00751). Cannot be merged."""

    method: Literal["houlsby"]
    bottleneck: Annotated[int, Field(ge=1, le=4096)] = 64
    """Width of the bottleneck."""
    placement: Literal["both", "mlp"] = "both"
    """`both`: after attention and after the MLP (Houlsby). `mlp`: after the MLP alone (Pfeiffer, 2005.00247)."""
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    """Nonlinearity between the two projections."""


class Full(Section):
    """Every weight trains, or every linear weight of the chosen layers. Needs about 16 bytes a trained parameter with AdamW in fp32."""

    method: Literal["full"]
    targets: Annotated[
        Annotated[Literal["all"], Tag("keyword")] | Annotated[SpectrumTargets, Tag("spectrum")], Discriminator(_whole_or_part)
    ] = "all"
    """`all`, or `{spectrum: 0.5}`: the linear weights of the layers with the highest signal-to-noise ratio."""


Tuning = Annotated[Lora | TiedLora | AdaLora | Vera | Ia3 | Prompt | Prefix | Norm | Bitfit | Houlsby | Full, Field(discriminator="method")]
