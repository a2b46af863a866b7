"""The configuration file as frozen pydantic models, one section a stage.

The attribute docstrings are the documentation: the JSON Schema, editor completion and docs/config.md are made from them. Field names are
the user's language; the mapping to PEFT's, bitsandbytes' and accelerate's names happens where those libraries are called.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune.config.data import (
    Data,
    FileSource,
    HubSource,
    Icd10cm,
    Source,
    ValidationSplit,
)
from finetune.config.distributed import Distributed
from finetune.config.evaluation import (
    ChoicesTask,
    Evaluation,
    ForgettingTask,
    GenerateTask,
    HarnessTask,
    KnowledgeTask,
    LossTask,
    Task,
)
from finetune.config.optimizer import ROLES, Galore, Group, Optimizer, Schedule
from finetune.config.samples import Samples
from finetune.config.section import Count, Positive, Section
from finetune.config.tracking import Tracking
from finetune.config.tuning import (
    AdaLora,
    Bitfit,
    DefaultInit,
    EvaInit,
    Full,
    GaussianInit,
    Houlsby,
    Ia3,
    Init,
    LoftqInit,
    Lora,
    Norm,
    OloraInit,
    OrthogonalInit,
    PissaInit,
    Prefix,
    Prompt,
    RegexTargets,
    SpectrumTargets,
    Targets,
    TiedLora,
    Tuning,
    Vera,
)

__all__ = [
    "ROLES",
    "AdaLora",
    "Bitfit",
    "ChoicesTask",
    "ComputeDtype",
    "Config",
    "Data",
    "DefaultInit",
    "Distributed",
    "EightBit",
    "EvaInit",
    "Evaluation",
    "FileSource",
    "ForgettingTask",
    "FourBit",
    "Full",
    "Galore",
    "GaussianInit",
    "GenerateTask",
    "Group",
    "HarnessTask",
    "Houlsby",
    "HubSource",
    "Ia3",
    "Icd10cm",
    "Init",
    "KnowledgeTask",
    "LoftqInit",
    "Lora",
    "LossTask",
    "Model",
    "NoQuantization",
    "Norm",
    "OloraInit",
    "Optimizer",
    "OrthogonalInit",
    "PissaInit",
    "Prefix",
    "Prompt",
    "Quantization",
    "RegexTargets",
    "Samples",
    "Schedule",
    "Section",
    "Source",
    "SpectrumTargets",
    "Targets",
    "Task",
    "TiedLora",
    "Tracking",
    "Train",
    "Tuning",
    "ValidationSplit",
    "Vera",
]

# --- model ---------------------------------------------------------------------------------------------------------------------------


class Model(Section):
    """The base model that is adapted."""

    id: Annotated[str, Field(min_length=1)]
    """A hub id (`meta-llama/Meta-Llama-3-70B`), a local directory, or `builtin:smollm2-135m`."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """The commit of the hub repository, 40 hexadecimal digits. Pin it for a run that must be repeated; a directory has none."""
    new_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tokens added to the tokenizer, such as `[<note>]`. They train with `tuning.embeddings: new-tokens` or `full`, or in full tuning."""


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
    """Stop after at most this many optimizer steps; the run ends with its last epoch where that comes first."""
    batch_size: Count = 32
    """Examples per optimizer step over ALL devices. The gradient depends on this, never on how it is cut up."""
    tokens_per_device: Annotated[int, Field(ge=16)] | Literal["auto"] = "auto"
    """Tokens (padding included) of a micro-batch: memory, not mathematics. `auto` takes a size that fits the device."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type. Trainable weights and optimizer states stay in `trainable_dtype`."""
    trainable_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of trainable weights and of the optimizer's states. bf16 halves them, and loses updates under half a step of the bf16 grid."""
    gradient_checkpointing: bool | Literal["auto", "offload"] = "auto"
    """Recompute activations in the backward pass: a third slower, far less memory. `offload`: what is kept for that, the input of every
    block, waits in the host's memory instead of the GPU's. `auto`: on for GPUs, offloaded where nothing else fits; off on CPU."""
    kernels: Literal["auto", "plain"] = "auto"
    """`auto`: examples laid end to end without padding, and LoRA's arithmetic in one function, wherever a probe of the model finds them
    exact. `plain`: padded batches and the libraries' own arithmetic."""
    compile: bool = False
    """Train decoder blocks as kernels that torch.compile makes: the first steps take a minute longer, later ones less. Needs a C++
    compiler, and Triton on a GPU. Not with `gradient_checkpointing: offload` or `strategy: fsdp`; on a CPU, with no checkpointing, and
    with `kernels: plain` where several cores train."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient's global norm; null: never."""
    evaluate: EveryEpoch = EveryEpoch()
    """When validation loss is measured."""
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    """When state is saved."""
    early_stopping: EarlyStopping | None = None
    """Null: run to the end."""
    samples: Samples | None = None
    """Let the model answer a few prompts now and then; null: never."""


# --- the rest ------------------------------------------------------------------------------------------------------------------------


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
