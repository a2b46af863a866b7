"""The configuration file as frozen pydantic models, one section a stage.

The attribute docstrings are the documentation: the JSON Schema, editor completion and docs/config.md are made from them. Field names are
the user's language; the mapping to PEFT's, bitsandbytes' and accelerate's names happens where those libraries are called.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """What every section shares: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


# --- model ---------------------------------------------------------------------------------------------------------------------------


class Model(Section):
    """The base model that is adapted."""

    id: Annotated[str, Field(min_length=1)]
    """A hub id (`meta-llama/Meta-Llama-3-70B`), a local directory, or `builtin:smollm2-135m`."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """The commit of the hub repository, 40 hexadecimal digits. Pin it for a run that must be repeated; a directory has none."""


# --- quantization --------------------------------------------------------------------------------------------------------------------

ComputeDtype = Literal["auto", "bf16", "fp32"]


class NoQuantization(Section):
    """The base stays in the precision of `train.precision`."""

    method: Literal["none"] = "none"


class FourBit(Section):
    """4-bit base weights through bitsandbytes, blocks of 64 (QLoRA). Embeddings, norms and lm_head stay unquantized."""

    method: Literal["nf4", "fp4"]
    """`nf4` is the better grid for normally distributed weights (relative error 0.094 against 0.126); `fp4` is for comparison."""
    double_quant: bool = True
    """Quantize the block constants too: 0.127 instead of 0.5 bit a parameter, at less than 0.2 % more error."""
    compute_dtype: ComputeDtype = "auto"
    """Type that weights are dequantized to for each matrix product. `auto` follows `train.precision`."""


class EightBit(Section):
    """8-bit base weights through bitsandbytes (LLM.int8)."""

    method: Literal["int8"]


Quantization = Annotated[NoQuantization | FourBit | EightBit, Field(discriminator="method")]

# --- tuning --------------------------------------------------------------------------------------------------------------------------


class DefaultInit(Section):
    """A drawn Kaiming-uniform, B zero: the adapter starts as nothing."""

    method: Literal["default"] = "default"


class GaussianInit(Section):
    """A drawn from a normal distribution of variance 1/r, B zero."""

    method: Literal["gaussian"]


class OrthogonalInit(Section):
    """A drawn with orthogonal rows, B zero-free but A and B orthogonal, so that BA starts at zero."""

    method: Literal["orthogonal"]


class LoftqInit(Section):
    """The adapter starts as the best rank-r correction of the quantization error (LoftQ, 2310.08659), scaled for alpha and rank."""

    method: Literal["loftq"]
    iterations: Annotated[int, Field(ge=1, le=10)] = 1
    """Alternations of quantization and SVD. 1 leaves the base a plain quantization of the original; more reduce the error further."""


Init = Annotated[DefaultInit | GaussianInit | OrthogonalInit | LoftqInit, Field(discriminator="method")]


class RegexTargets(Section):
    """Every linear module whose full name matches."""

    regex: Annotated[str, Field(min_length=1)]
    """A Python regular expression over full module names, such as `layers\\.(2[0-9])\\..*_proj`."""


def _targets_kind(value: object) -> str:
    if isinstance(value, str):
        return "keyword"
    return "names" if isinstance(value, (list, tuple)) else "regex"


Targets = Annotated[
    Annotated[Literal["attention", "mlp", "all-linear"], Tag("keyword")]
    | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), Tag("names")]
    | Annotated[RegexTargets, Tag("regex")],
    Discriminator(_targets_kind),
]


class Lora(Section):
    """Low-rank adaptation (2106.09685) and its variants: h = Wx + s BAx."""

    method: Literal["lora"]
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank r of the update. 4-8 for style, 16 for instructions, 32-64 for a domain, 64-256 for new knowledge."""
    alpha: Positive = 16.0
    """Numerator of the scale s. With rslora, alpha = rank gives s = sqrt(rank)."""
    scaling: Literal["lora", "rslora"] = "lora"
    """`lora`: s = alpha/r. `rslora`: s = alpha/sqrt(r) (2312.03732), which keeps gradients alive at rank 64 and above."""
    init: Init = DefaultInit()
    """How A and B start. `loftq` needs a quantized base."""
    dora: bool = False
    """Train a magnitude for each output row beside the direction (DoRA, 2402.09353). Better at low ranks, about a third slower."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input. 0.05-0.1 below 10k examples, 0 for large or knowledge-heavy data."""
    targets: Targets = "all-linear"
    """Modules that get an adapter: `attention`, `mlp`, `all-linear`, a list of names (`[q_proj, v_proj]`), or `{regex: ...}`."""
    embeddings: Literal["frozen", "lora", "full"] = "frozen"
    """Whether the input embeddings train. `lora` for a domain with its own vocabulary; `full` stores a whole copy of them."""


class Full(Section):
    """Every weight trains. Needs about 16 bytes a parameter with AdamW in fp32."""

    method: Literal["full"]


Tuning = Annotated[Lora | Full, Field(discriminator="method")]

# --- optimizer -----------------------------------------------------------------------------------------------------------------------


ROLES = ("embeddings", "attention", "mlp", "lm_head", "norms", "lora-a", "lora-b", "magnitudes")
"""Roles of parameters that `optimizer.groups` may name beside regular expressions."""


class Group(Section):
    """Learning rate and weight decay of one group of parameters."""

    lr_ratio: Positive | None = None
    """Multiplies `optimizer.learning_rate`. Give this or `learning_rate`, not both."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Absolute learning rate of the group."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Weight decay of the group instead of `optimizer.weight_decay`."""


class Optimizer(Section):
    """AdamW and the learning rate of every parameter."""

    method: Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "paged-adamw-32bit"] = "adamw"
    """`paged-adamw-8bit` quarters the states and lets them spill to host memory; `adamw` is exact."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-4
    """Peak learning rate. LoRA's best is about ten times that of full fine-tuning and hardly moves with rank."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Decoupled weight decay. Norms, biases and DoRA magnitudes are never decayed unless their group asks for it."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.999
    """Decay of the second moment. 0.95-0.99 for short runs, where 0.999 has not warmed up."""
    epsilon: Positive = 1e-8
    """Added to the root of the second moment."""
    groups: dict[str, Group] = {}
    """Differential learning rates: a role (`embeddings`, `attention`, `mlp`, `lm_head`, `norms`, `lora-a`, `lora-b`, `magnitudes`) or a
    regular expression over parameter names. The first match wins; a group that matches nothing is an error."""
    lora_plus_ratio: Annotated[float, Field(ge=1.0, le=256.0)] = 1.0
    """LoRA+ (2402.12354): learning rate of B over that of A. Composes with groups. 16 at a lower rate is the paper's choice."""


class Schedule(Section):
    """Learning rate over optimizer steps."""

    method: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Share of all steps that warm up linearly from zero. Give this or `warmup_steps`; 0.03 if neither is given."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of optimizer steps that warm up linearly from zero."""
    min_lr_ratio: Fraction = 0.0
    """Where the decay ends, as a share of the peak."""


# --- data ----------------------------------------------------------------------------------------------------------------------------


class FileSource(Section):
    """Rows from a file or a directory."""

    source: Annotated[str, Field(min_length=1)]
    """A .jsonl, .json, .csv, .parquet, .txt or .md file, or a directory or glob of them. Relative paths start at the config's directory."""
    format: Literal["auto", "chat", "prompt-completion", "question-answer", "alpaca", "text"] = "auto"
    """How a row becomes a conversation. `auto` recognizes it by its columns."""
    weight: Positive = 1.0
    """How often the source is seen in an epoch: 2 is twice, 0.5 a seeded half."""


class Icd10cm(Section):
    """Real medical knowledge: ICD-10-CM facts (inclusion term -> title) as documents and questions in many phrasings."""

    source: Literal["builtin:icd10cm"]
    document_facts: Annotated[int, Field(ge=0, le=400)] = 40
    """Facts that are trained as declarative documents only (arm D of the benchmark)."""
    question_facts: Annotated[int, Field(ge=0, le=400)] = 40
    """Facts that are trained as documents and as questions of one style (arm D+Q)."""
    control_facts: Annotated[int, Field(ge=1, le=400)] = 40
    """Facts that are never trained (arm H): what they gain is style, not knowledge."""
    chapters: tuple[Annotated[str, Field(pattern=r"^[A-Z]$")], ...] = ()
    """First letters of the codes to draw from. Empty: A to N without C."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Which facts are drawn, and to which arm each goes."""
    weight: Positive = 1.0
    """How often the source is seen in an epoch."""


def _source_kind(value: object) -> str:
    source = value.get("source") if isinstance(value, dict) else getattr(value, "source", None)
    return "icd10cm" if source == "builtin:icd10cm" else "file"


Source = Annotated[Annotated[Icd10cm, Tag("icd10cm")] | Annotated[FileSource, Tag("file")], Discriminator(_source_kind)]


class ValidationSplit(Section):
    """Validation rows taken from the training sources by content hash, so that equal rows land on one side."""

    fraction: Annotated[float, Field(gt=0.0, lt=0.5)]
    """Share of the training rows."""


def _validation_kind(value: object) -> str:
    return "sources" if isinstance(value, (list, tuple)) else "split"


class Data(Section):
    """What the model learns from."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources of training rows."""
    validation: (
        Annotated[
            Annotated[ValidationSplit, Tag("split")] | Annotated[tuple[Source, ...], Field(min_length=1), Tag("sources")],
            Discriminator(_validation_kind),
        ]
        | None
    ) = None
    """`{fraction: 0.02}` of the training rows, a list of sources, or null for none."""
    max_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = 2048
    """Longest example, in tokens."""
    supervise: Literal["assistant", "last-turn", "all"] = "assistant"
    """Which tokens carry loss: every assistant turn, the last one, or every token."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What happens to an example longer than `max_tokens`."""


# --- train ---------------------------------------------------------------------------------------------------------------------------


class EveryEpoch(Section):
    """When to evaluate."""

    every_steps: Count | None = None
    """Optimizer steps between evaluations; null: at the end of each epoch."""


class CheckpointPolicy(Section):
    """When to save, and how many to keep."""

    every_steps: Count | None = None
    """Optimizer steps between checkpoints; null: at the end of each epoch."""
    keep: Count = 2
    """Newest checkpoints kept. The best one by validation loss is kept besides."""


class EarlyStopping(Section):
    """Stop when validation loss no longer falls."""

    patience: Count = 3
    """Evaluations without improvement before the run stops."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """Fall of validation loss (nats a token) that counts as improvement."""


class Train(Section):
    """Length of the run, batch, precision and what is saved."""

    epochs: Count = 1
    """Passes over the training data."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: Count = 32
    """Examples per optimizer step over ALL devices. The gradient depends on this, never on how it is cut up."""
    tokens_per_device: Annotated[int, Field(ge=16)] | Literal["auto"] = "auto"
    """Tokens (padding included) of a micro-batch: memory, not mathematics. `auto` takes a size that fits the device."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type. Adapter weights and optimizer states are fp32 in any case."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: a third slower, far less memory. `auto`: on for GPUs, off on CPU."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient's global norm; null: never."""
    evaluate: EveryEpoch = EveryEpoch()
    """When validation loss is measured."""
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    """When state is saved."""
    early_stopping: EarlyStopping | None = None
    """Null: run to the end."""


# --- evaluation ----------------------------------------------------------------------------------------------------------------------


class LossTask(Section):
    """Negative log-likelihood and perplexity of the validation rows over supervised tokens."""

    task: Literal["loss"]


class KnowledgeTask(Section):
    """Closed-book questions about the ICD-10-CM facts of `data.train`, in wordings never trained."""

    task: Literal["knowledge"]
    questions_per_fact: Annotated[int, Field(ge=1, le=3)] = 1
    """Wordings asked for each fact."""
    generate: bool = True
    """Also let the model answer freely and compare (exact match)."""


class ForgettingTask(Section):
    """What became of general English: loss on general text, and four-way choice on general questions."""

    task: Literal["forgetting"]


Task = Annotated[LossTask | KnowledgeTask | ForgettingTask, Field(discriminator="task")]


class Evaluation(Section):
    """What `finetune eval RUN` measures, for the base and the tuned model side by side."""

    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] = (LossTask(task="loss"), ForgettingTask(task="forgetting"))
    """Measured in this order."""
    samples: Annotated[int, Field(ge=0, le=50)] = 3
    """Questions whose answers, before and after, are shown."""


# --- the rest ------------------------------------------------------------------------------------------------------------------------


class Distributed(Section):
    """How several devices share the work."""

    strategy: Literal["auto", "ddp"] = "auto"
    """`ddp`: every device holds the (quantized) model and works on its share of each batch."""


class Tracking(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard event files into the run directory (extra `tracking`)."""
    wandb: bool = False
    """Log to Weights & Biases (extra `tracking`; log in with `wandb login`)."""


class Config(Section):
    """A whole run."""

    model: Model
    quantization: Quantization = NoQuantization()
    """How the frozen base is stored: `none`, `nf4`, `fp4` or `int8`."""
    tuning: Tuning
    """What trains: the union is keyed by `method`."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    data: Data
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    distributed: Distributed = Distributed()
    tracking: Tracking = Tracking()
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seeds everything: adapter initialization, sample order, dropout."""
    output: Annotated[str, Field(min_length=1)]
    """The run directory. It must not exist yet, or be resumed with `--resume`. Relative paths start at the working directory."""
