"""Memory of a run on one device, by part, counted from what training stores; nothing is loaded.

Every part is a product of sizes that the code of training fixes, named where it is computed. Two numbers of each kind of device are no
such products: what a process holds before it has a model, and what an allocator wastes; and on a CPU the libraries' pages (docs/adr/0029).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from finetune.config.schema import Config, EightBit, FourBit, Full, Lora, NoQuantization, SpectrumTargets
from finetune.planning.activations import CAPPED, Arithmetic, arithmetic, kept, outside, probabilities, work
from finetune.planning.lanes import FORK, count_lanes
from finetune.planning.offload import host_bytes
from finetune.planning.parameters import Parameters
from finetune.planning.shapes import ModelShape
from finetune.planning.states import BYTES, state_bytes

if TYPE_CHECKING:
    from finetune.planning.resolve import Precision, Resolved

_FP32 = 4
_BLOCK, _OUTER_BLOCK = 64, 256
"""Weights of 4 bits that share a constant, and constants that share one (2305.14314, section 3)."""
_ROWS = 256
"""Supervised positions whose logits exist at a time (`finetune.model.head`)."""
_WIDE_ROWS = {"cpu": 32, "cuda": 128}
"""Of them, those that are in fp32 at a time over a frozen head (`finetune.model.frozen_head`)."""
_GATHERED = 2
"""Blocks that are whole at a time where they are spread: the one that computes, and the next."""
_LEAST_TOKENS = 16
"""The smallest `train.tokens_per_device`."""
PROCESS: Mapping[str, int] = {"cpu": 555 * 2**20, "cuda": 820 * 2**20}
"""Bytes of a process without a model, pages of files apart. CPU: 446 MiB were measured before the first step; the rest, what oneDNN
compiles and works in, is where the peaks of sixteen runs begin. GPU: context and workspaces, assumed, not measured."""
_LIBRARIES = 170 * 2**20
"""Pages of shared libraries that a process on a CPU has touched, measured: 169 to 174 MiB beside a model's file of 257."""
WASTED: Mapping[str, float] = {"cpu": 0.33, "cuda": 0.05}
"""Holes of the allocator as a share of what comes and goes: how the peaks of the same sixteen runs grow, with glibc 2.36, whose heap gives
holes of large tensors to smaller ones that stay. GPU: assumed, not measured."""

PARTS: Mapping[str, str] = {
    "base": "weights of the base's blocks, as they are stored",
    "embeddings": "embeddings, output head and last norm, never quantized",
    "trained": "what the method adds to the base",
    "gradients": "of what trains",
    "optimizer": "its states",
    "activations": "what the forward pass keeps for the backward pass",
    "work": "what one block needs while it computes",
    "gathered": "blocks that are gathered from other devices",
    "mapped": "pages of the checkpoint's file, which the system takes back where memory is short",
    "logits": "one chunk of supervised positions by the vocabulary",
    "process": "libraries and device context, of forks too",
    "reserve": "what the allocator cannot use",
}
"""Parts in the order in which they are shown, and what each is."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What was decided of a run, whoever decided it."""

    kind: Literal["cpu", "cuda"]
    precision: Precision
    compute_dtype: Precision
    """Type that a quantized base is dequantized to, and that its unquantized weights have."""
    tokens: int
    """Of a micro-batch, which is taken to be full."""
    checkpointing: bool
    optimizer: str
    """`optimizer.method`, never `auto`."""
    strategy: str = "ddp"
    world: int = 1
    """Processes that train together."""
    threads: int = 1
    """Of a process on a CPU: its cores share a step, each with micro-batches of its own."""
    example_tokens: int = 512
    """Length of an example; all are taken to have it. A CPU keeps the attention of short ones."""
    offload: bool = False
    """With checkpointing: hidden states wait in host memory."""


def setting_of(resolved: Resolved, kind: Literal["cpu", "cuda"], *, world: int = 1, threads: int = 1, example_tokens: int = 512) -> Setting:
    """The setting that ``resolved`` makes."""
    return Setting(
        kind=kind,
        precision=resolved.precision.value,
        compute_dtype=resolved.compute_dtype.value,
        tokens=resolved.tokens_per_device.value,
        checkpointing=bool(resolved.gradient_checkpointing.value),
        optimizer=resolved.optimizer.value,
        strategy=resolved.strategy.value,
        world=world,
        threads=threads,
        example_tokens=example_tokens,
        offload=resolved.gradient_checkpointing.value == "offload",
    )


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the peak of a step."""

    parts: dict[str, int]
    """By the names of `PARTS`, in their order."""
    spillable: int = 0
    """Of the total: states of a paged optimizer, which move to host memory where the device is full."""
    pages: int = 0
    """Of the total: pages of files, which the system may take back and read again. Libraries and a base that is computed with as it lies in
    its file are among them: a run that has to read those again in every step crawls, and so they count as needed."""
    host: int = 0
    """Beside the total: host memory that a GPU's hidden states wait in."""

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def own(self) -> int:
        """What the process and its forks hold by themselves, in pages of no file."""
        return self.total - self.pages

    @property
    def firm(self) -> int:
        """What gives way to nothing: all parts but those that spill or that the system takes back."""
        return self.total - self.spillable - self.parts.get("mapped", 0)


def estimate_memory(shape: ModelShape, parameters: Parameters, config: Config, setting: Setting) -> Memory:
    """Bytes on one device (on a CPU, of one process and its forks) at the peak of a step.

    What loading the weights and computing a start (`tuning.init`) take for a while is not in it.
    """
    how = arithmetic(shape, config, setting.kind, BYTES[setting.precision], _storage(config, setting))
    lanes = count_lanes(shape, parameters, config, setting, how)
    weights = _weights(shape, parameters, config, setting)
    passing = _passing(shape, parameters, config, setting, how, lanes)
    gradients = float(parameters.trainable * BYTES[config.train.trainable_dtype])
    if lanes > 1:  # each has its own, and adds the next micro-batch's to it as a third, when what that one kept is gone
        gradients = max(lanes * gradients, 3 * lanes * gradients - sum(passing.values()))
    found = weights | passing | {"gradients": gradients, "optimizer": state_bytes(parameters, config, setting.optimizer)}
    small = _small(shape, setting, how)
    found["reserve"] = max(0.0, WASTED[setting.kind] * (gradients + sum(passing.values()) - small) - small)
    found |= {"mapped": 0, "process": PROCESS[setting.kind]}
    pages = 0.0
    if setting.kind == "cpu":
        views = _views(shape, parameters, config, setting)
        found |= _on_host(shape, config, found, views=bool(views))
        found["process"] += _LIBRARIES + (lanes - 1) * FORK
        pages = found["mapped"] + views + _LIBRARIES
    parts = {name: math.ceil(found[name]) for name in PARTS}
    paged = setting.kind == "cuda" and setting.optimizer.startswith("paged")
    host = host_bytes(shape, setting.tokens, how.stream) if setting.offload else 0
    return Memory(parts, spillable=parts["optimizer"] if paged else 0, pages=math.floor(pages), host=host)


def floor_memory(shape: ModelShape, parameters: Parameters, config: Config, setting: Setting) -> Memory:
    """What no micro-batch goes below: weights, gradients and states, without those that could lie in host memory.

    A device with less than this cannot train ``config``.
    """
    least = replace(setting, tokens=_LEAST_TOKENS, example_tokens=_LEAST_TOKENS, checkpointing=True, threads=1)
    smallest = estimate_memory(shape, parameters, config, least)
    certain = ("base", "embeddings", "trained", "gradients", *(() if smallest.spillable else ("optimizer",)))
    return Memory({name: size if name in certain else 0 for name, size in smallest.parts.items()})


# --- weights -------------------------------------------------------------------------------------------------------------------------


def _storage(config: Config, setting: Setting) -> int:
    """Bytes of an unquantized scalar of the base."""
    return BYTES[setting.precision if isinstance(config.quantization, NoQuantization) else setting.compute_dtype]


def _weights(shape: ModelShape, parameters: Parameters, config: Config, setting: Setting) -> dict[str, float]:
    storage, scalar, tuning = _storage(config, setting), BYTES[config.train.trainable_dtype], config.tuning
    blocks = _bits(shape, config, storage) / 8 + (shape.norms_scalars - shape.hidden + shape.biases_scalars) * storage
    rest = float((shape.embedding_scalars + shape.head_scalars + shape.hidden) * storage)
    rest += (parameters.base - shape.total) * storage  # rows of new tokens
    added = float((parameters.trainable + parameters.buffers) * scalar)
    if isinstance(tuning, Full):
        if isinstance(tuning.targets, SpectrumTargets):
            blocks += parameters.trainable * (scalar - storage)
        else:
            blocks, rest = blocks * scalar / storage, rest * scalar / storage
        added = 0.0
    gathered = 0.0
    if setting.strategy == "fsdp" and setting.world > 1:
        gathered = _GATHERED * blocks / shape.layers
        blocks = 0.0 if config.distributed.offload else blocks / setting.world
    return {"base": blocks, "embeddings": rest, "trained": added, "gathered": gathered}


def _bits(shape: ModelShape, config: Config, storage: int) -> float:
    """Bits that the matrices of the blocks take."""
    match config.quantization:
        case FourBit(double_quant=True):
            each = 4 + (8 + 32 / _OUTER_BLOCK) / _BLOCK
        case FourBit():
            each = 4 + 32 / _BLOCK
        case EightBit():
            each = 8 + 32 / shape.hidden  # a scale for each row
        case NoQuantization():
            each = 8.0 * storage
    return shape.blocks_scalars * each


# --- a CPU ---------------------------------------------------------------------------------------------------------------------------


def _views(shape: ModelShape, parameters: Parameters, config: Config, setting: Setting) -> float:
    """Bytes of the base that are pages of the model's file: what neither trains nor is converted, in the type in which models are published
    (two bytes a scalar)."""
    whole = isinstance(config.tuning, Full) and not isinstance(config.tuning.targets, SpectrumTargets)
    if _storage(config, setting) != BYTES["bf16"] or whole or (setting.strategy == "fsdp" and setting.world > 1):
        return 0.0
    scalars = shape.norms_scalars + shape.biases_scalars
    if parameters.base == shape.total:  # else there are new tokens, for which embeddings are copied
        scalars += shape.embedding_scalars + shape.head_scalars
    if isinstance(config.quantization, NoQuantization):
        scalars += shape.blocks_scalars
    return float(BYTES["bf16"] * (scalars - (parameters.trainable if isinstance(config.tuning, Full) else 0)))


def _on_host(shape: ModelShape, config: Config, found: Mapping[str, float], *, views: bool) -> dict[str, float]:
    """Parts that are other ones where host memory is the device's: checkpoints are copied and read back in it.

    ``views``: embeddings and norms of a quantized base are views of the model's file, which therefore stays mapped as far as it was read.
    """
    weights = found["trained"] or found["gradients"]  # of what trains: in full tuning they are the base's own
    mapped = max(weights, found["optimizer"])  # what was written is mapped and compared, one file at a time
    passing = sum(found[name] for name in ("gradients", "activations", "work", "logits"))
    copied = weights + found["optimizer"] - passing  # once a step has given back what came and went
    if not isinstance(config.quantization, NoQuantization):
        mapped += BYTES["bf16"] * shape.blocks_scalars * views
    return {"mapped": mapped, "reserve": found["reserve"] + max(0.0, copied)}


def _small(shape: ModelShape, setting: Setting, how: Arithmetic) -> float:
    """Of what comes and goes: tensors small enough for the holes that the others leave, which are a CPU's probabilities of attention."""
    blocks = 1 if setting.checkpointing else shape.layers
    return blocks * probabilities(shape, how, setting.example_tokens) * setting.tokens


# --- a step --------------------------------------------------------------------------------------------------------------------------


def _passing(shape: ModelShape, parameters: Parameters, config: Config, setting: Setting, how: Arithmetic, lanes: int) -> dict[str, float]:
    """What exists during a pass alone."""
    block = kept(shape, config, how, setting.example_tokens) * setting.tokens
    logits = lanes * _logits(shape, config, how)
    inside = work(shape, how) * setting.tokens + lanes * _unpacked(shape, config, setting)
    activations = shape.layers * block + outside(shape, how) * setting.tokens
    # what trains, in the type of products: autocast makes a copy, which the graph keeps
    copies = 0 if how.own_layers or how.product == BYTES[config.train.trainable_dtype] else parameters.trainable * how.product
    if setting.checkpointing:
        waiting = 0 if setting.offload else shape.hidden * how.stream * setting.tokens  # one block's are back at a time, in what it keeps
        activations += shape.layers * (waiting - block)
        inside += block - copies  # nothing keeps them when the first block is computed again
    if setting.kind == "cuda":  # the last logits are gone before the first block's gradient is begun, and their memory is taken again
        inside = max(0.0, inside - logits)
    return {"activations": activations + copies, "logits": logits, "work": max(0.0, inside)}


def _logits(shape: ModelShape, config: Config, how: Arithmetic) -> float:
    """One chunk: logits as the product gives them, and those that are in fp32 at a time; with a head that trains all, thrice."""
    narrow = how.product if how.product < _FP32 else 0
    tuning = config.tuning
    whole = isinstance(tuning, Full) and not isinstance(tuning.targets, SpectrumTargets)
    trains = whole or (shape.tied and isinstance(tuning, Lora) and tuning.embeddings == "full")
    if not trains and shape.family not in CAPPED:
        return shape.vocab * (_ROWS * how.product + (_WIDE_ROWS[how.kind] * _FP32 if narrow else 0))
    weight = shape.vocab * shape.hidden * (2 * how.product + _FP32) if trains else 0
    return _ROWS * shape.vocab * (2 * narrow + 3 * _FP32) + weight


def _unpacked(shape: ModelShape, config: Config, setting: Setting) -> int:
    """The largest weight of a block in the type of products, where it is stored in another."""
    product = BYTES[setting.precision]
    same = isinstance(config.quantization, NoQuantization) and _storage(config, setting) == product
    return 0 if same else product * max(matrix.weights for matrix in shape.matrices)
