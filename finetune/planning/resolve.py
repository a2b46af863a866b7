"""Every "auto" of the configuration, decided once, with the reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from finetune.config.schema import Config, FourBit, Prefix
from finetune.hardware import Machine
from finetune.planning.checkpointing import Sizes, needs_offload, sizes_of
from finetune.planning.memory import setting_of
from finetune.planning.strategy import Crowd, choose_strategy

T = TypeVar("T")
Precision = Literal["bf16", "fp32"]
Checkpointing = bool | Literal["offload"]

_BYTES: dict[Precision, int] = {"bf16": 2, "fp32": 4}
_CPU_MICRO_BATCH_TOKENS = 1024
_GPU_MICRO_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """A value and the sentence that says why."""

    value: T
    reason: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the configuration left open."""

    precision: Choice[Precision]
    compute_dtype: Choice[Precision]
    """Type that a quantized base is dequantized to."""
    tokens_per_device: Choice[int]
    gradient_checkpointing: Choice[Checkpointing]
    strategy: Choice[str]
    optimizer: Choice[str]
    """`optimizer.method`, never `auto`."""

    def types(self) -> dict[str, str]:
        """What `pinned` takes back: all that decides the numbers of a run."""
        return {"precision": self.precision.value, "compute_dtype": self.compute_dtype.value, "optimizer": self.optimizer.value}

    def pinned(self, precision: Precision, compute_dtype: Precision, optimizer: str | None = None) -> Resolved:
        """The same with the types and the optimizer that a run was started with, on whatever machine it goes on.

        ``optimizer`` is None for runs whose records are older than the choice: those stated it.
        """
        reason = "as the run was started"
        kept = self.optimizer if optimizer is None else Choice(optimizer, reason)
        return replace(self, precision=Choice(precision, reason), compute_dtype=Choice(compute_dtype, reason), optimizer=kept)

    def as_dict(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)


def resolve(config: Config, machine: Machine, crowd: Crowd | None = None, sizes: Sizes | None = None) -> Resolved:
    """Decide every "auto" of ``config`` for ``machine``, which trains alone or in ``crowd``.

    ``sizes``: of the model and the data; without them, examples are taken to be as long as `data.max_tokens` lets them be.
    """
    crowd = crowd or Crowd()
    precision = _precision(config, machine)
    compute_dtype = _compute_dtype(config, precision)
    resolved = Resolved(
        precision=precision,
        compute_dtype=compute_dtype,
        tokens_per_device=_tokens(config, machine),
        gradient_checkpointing=_checkpointing(config, machine),
        strategy=Choice(*choose_strategy(config, machine, _BYTES[compute_dtype.value], crowd)),
        optimizer=_optimizer(config, machine),
    )
    may_offload = machine.kind == "cuda" and not config.train.compile  # which does not compose with it
    if config.train.gradient_checkpointing == "auto" and may_offload and resolved.gradient_checkpointing.value:
        return _offloaded(resolved, config, machine, crowd.world, sizes or sizes_of(config))
    return resolved


def _precision(config: Config, machine: Machine) -> Choice[Precision]:
    if config.train.precision != "auto":
        return Choice(config.train.precision, "stated in train.precision")
    if machine.bf16:
        return Choice("bf16", f"{machine.name} multiplies bf16 matrices in hardware")
    return Choice("fp32", f"{machine.name} has no bf16 matrix instructions")


def _compute_dtype(config: Config, precision: Choice[Precision]) -> Choice[Precision]:
    if isinstance(config.quantization, FourBit) and config.quantization.compute_dtype != "auto":
        return Choice(config.quantization.compute_dtype, "stated in quantization.compute_dtype")
    return Choice(precision.value, f"follows the precision ({precision.reason})")


def _tokens(config: Config, machine: Machine) -> Choice[int]:
    if config.train.tokens_per_device != "auto":
        return Choice(config.train.tokens_per_device, "stated in train.tokens_per_device")
    usual = _GPU_MICRO_BATCH_TOKENS if machine.kind == "cuda" else _CPU_MICRO_BATCH_TOKENS
    if config.data.max_tokens > usual:
        return Choice(config.data.max_tokens, "one example of data.max_tokens must fit")
    return Choice(usual, f"enough to keep a {machine.kind} busy; larger micro-batches only cost memory")


def _optimizer(config: Config, machine: Machine) -> Choice[str]:
    if config.optimizer.method != "auto":
        return Choice(config.optimizer.method, "stated in optimizer.method")
    if machine.kind == "cuda":
        return Choice("paged-adamw-8bit", "its states take a quarter of AdamW's and spill to host memory instead of failing")
    return Choice("adamw", "host memory is plentiful, and 32-bit states are exact")


def _checkpointing(config: Config, machine: Machine) -> Choice[Checkpointing]:
    if config.train.gradient_checkpointing != "auto":
        return Choice(config.train.gradient_checkpointing, "stated in train.gradient_checkpointing")
    if isinstance(config.tuning, Prefix):
        return Choice(False, "prefix tuning hands keys and values to each layer, which recomputing would lose")
    if machine.kind == "cuda":
        return Choice(True, "GPU memory is the usual limit; recomputing costs about a third more time")
    return Choice(False, "host memory is plentiful, and recomputing costs about 40 % more time on a CPU")


def _offloaded(resolved: Resolved, config: Config, machine: Machine, world: int, sizes: Sizes | None) -> Resolved:
    """``resolved`` with hidden states in host memory, where a GPU holds the run in no other way."""
    if sizes is None:
        return resolved
    setting = setting_of(resolved, machine.kind, world=world, example_tokens=sizes.longest)
    measured = config.train.tokens_per_device == "auto" and setting.strategy == "ddp"  # down to one example, if need be
    setting = replace(setting, tokens=sizes.longest if measured else setting.tokens)
    if not needs_offload(config, sizes, setting, machine.memory_bytes):
        return resolved
    held = f"{machine.memory_bytes / 2**30:.0f} GiB hold {'one example' if measured else 'a micro-batch'} in no other way"
    return replace(resolved, gradient_checkpointing=Choice("offload", f"{held}: hidden states wait in host memory"))
