"""The trainable model of a run: quantized base, rows for new tokens, adapter, start."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import Config, EightBit, EvaInit, FourBit, LoftqInit, Lora, OloraInit, OrthogonalInit, PissaInit
from finetune.config.tuning_checks import needs_bf16
from finetune.data.batches import collate, cut
from finetune.data.render import Example
from finetune.errors import ConfigError
from finetune.hardware import available_memory, crowd_size
from finetune.model.adapters import attach, name_base
from finetune.model.builtin import public_name
from finetune.model.compiled import compile_blocks, require_compiler
from finetune.model.computed_start import StartReport
from finetune.model.drawn import apply_eva, draw_orthogonal
from finetune.model.fast import Accelerated, accelerate
from finetune.model.heap import freed_at_once, return_freed_memory
from finetune.model.load import DTYPES, load_base, storage_dtype
from finetune.model.loftq import Quantizer, apply_loftq, restore_base
from finetune.model.methods import Given
from finetune.model.offload import PinnedMemory, checkpoint_blocks
from finetune.model.packed import require_agreement
from finetune.model.pissa import apply_moved, restore_moved
from finetune.model.spectrum import ratios_for
from finetune.model.tokens import enlarge
from finetune.planning.placement import require_gpu_to_offload
from finetune.planning.resolve import Resolved
from finetune.scoring import Scorer
from finetune.training.lanes import can_share

_HOST_SHARE = 0.4
"""Of the host memory that is free once the model is built, for hidden states that wait there; paged states may take the rest."""


@dataclass(frozen=True, slots=True)
class Materials:
    """What a model is built from, besides the configuration."""

    base: Path
    """Directory of the base model."""
    resolved: Resolved
    new_ids: Sequence[int]
    """Ids of `model.new_tokens`."""
    rows: Sequence[Example]
    """Training rows, which EVA's start looks at."""


@dataclass(frozen=True, slots=True)
class Built:
    """A model that is ready to train."""

    model: Any
    start: StartReport | None
    """Where the adapter's start was computed from the weights: its factors, which the run keeps."""
    method: str
    """`tuning.init.method`."""
    accelerated: Accelerated | None
    """What `train.kernels: auto` switched on."""
    compiled: int = 0
    """Blocks that torch.compile compiles when they first run."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should see of how the model was built."""
        if self.start is None:
            return ()
        if self.method == "loftq":
            layers = (f"{kind} {error.before:.3f} -> {error.after:.3f}" for kind, error in self.start.layers.items())
            return (f"LoftQ, relative quantization error: {', '.join(layers)}",)
        layers = (f"{kind} {error.after:.3f}" for kind, error in self.start.layers.items())
        return (f"{self.method}, share of the weight's norm that stays in the base: {', '.join(layers)}",)


def build_model(config: Config, materials: Materials, device: torch.device, resumed: Path | None = None) -> Built:
    """Load the base of ``config`` onto ``device`` and make it trainable; seed first. ConfigError where the method does not fit it,
    HardwareError where it is to move activations off a GPU and there is none.

    ``resumed`` is the run directory whose base is to be rebuilt instead of initialized anew.
    """
    base, resolved = materials.base, materials.resolved
    _require_device(config, resolved)
    _require_types(config, resolved)
    dtype = storage_dtype(config.quantization, resolved)
    require_agreement(base, config.quantization, config.tuning)
    on_host = device.type == "cpu"
    with freed_at_once() if on_host else nullcontext():
        plain = load_base(base, config.quantization, dtype, device)
        enlarge(plain, materials.new_ids)
    ratios = ratios_for(config.tuning, base)
    given = Given(seed=config.seed, dtype=DTYPES[config.train.trainable_dtype], ratios=ratios, new_ids=materials.new_ids)
    model = attach(plain, config.tuning, given)
    # what others load the adapter onto; a path of this machine would mean nothing to them
    name_base(model, public_name(config.model.id))
    _set_checkpointing(model, resolved)
    # a model that will be spread over devices is on the host until then
    fast = accelerate(model, config.tuning, pack=resolved.strategy.value != "fsdp") if config.train.kernels == "auto" else None
    compiled = _compiled(model, config, device)
    if on_host:
        return_freed_memory()
    if not isinstance(config.tuning, Lora):
        return Built(model, None, "default", fast, compiled)
    method = config.tuning.init.method
    if resumed is not None:
        _restore(model, config, materials, resumed)
        return Built(model, None, method, fast, compiled)
    return Built(model, _start(model, config, materials, device), method, fast, compiled)


def _set_checkpointing(model: Any, resolved: Resolved) -> None:
    match resolved.gradient_checkpointing.value:
        case "offload":
            _, processes = crowd_size()
            checkpoint_blocks(model, PinnedMemory(int(_HOST_SHARE * available_memory() / processes)))
        case True:
            checkpoint_blocks(model)


def _require_device(config: Config, resolved: Resolved) -> None:
    """What `offload` and `compile` need of the device that computes, wherever the model is built."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    require_gpu_to_offload(resolved, kind)
    if not config.train.compile:
        return
    require_compiler(kind)
    if kind == "cpu" and resolved.gradient_checkpointing.value:
        raise ConfigError(
            "on a CPU nothing of a checkpointed block is compiled: its attention is not, and a checkpoint is compiled whole or not at all",
            where="train.compile",
            fix="set `gradient_checkpointing: false`, or remove `compile`",
        )


def _compiled(model: Any, config: Config, device: torch.device) -> int:
    """Let blocks be compiled where that is asked for; returns how many are."""
    if not config.train.compile:
        return 0
    if torch.get_num_threads() > 1 and can_share(Scorer(model, device, "fp32"), crowd_size()[0]):
        raise ConfigError(
            "the cores of this CPU each compute micro-batches of their own, and torch compiles for one thread at a time: what is compiled, "
            "and so the rounding, would be left to chance",
            where="train.compile",
            fix="remove it, which is faster here; or set `kernels: plain`, or OMP_NUM_THREADS=1",
        )
    return compile_blocks(model)


def _require_types(config: Config, resolved: Resolved) -> None:
    """What the check of the configuration asks of a stated precision, for one that the device decided."""
    if resolved.precision.value == "fp32" and (why := needs_bf16(config)):
        raise ConfigError(
            f"`train.trainable_dtype: bf16` needs `precision: bf16` here, and `auto` chose fp32 ({resolved.precision.reason}): {why}",
            where="train.precision",
            fix="set `trainable_dtype: fp32`, or `precision: bf16`",
        )


def _start(model: Any, config: Config, materials: Materials, device: torch.device) -> StartReport | None:
    """Write the start of `tuning.init` over the one that PEFT drew, where it is another."""
    assert isinstance(config.tuning, Lora)
    match config.tuning.init:
        case LoftqInit():
            assert isinstance(config.quantization, FourBit | EightBit), "config/checks.py refuses LoftQ on an unquantized base"
            dtype = storage_dtype(config.quantization, materials.resolved)
            return apply_loftq(model, materials.base, config.tuning, Quantizer(config.quantization, dtype))
        case PissaInit() | OloraInit() as init:
            return apply_moved(model, materials.base, init)
        case EvaInit() as init:
            _eva(model, init, config.seed, materials, device)
        case OrthogonalInit():
            draw_orthogonal(model)
    return None


def _restore(model: Any, config: Config, materials: Materials, run: Path) -> None:
    """Give ``model`` the base that the run's checkpoints belong to."""
    assert isinstance(config.tuning, Lora)
    match config.tuning.init:
        case LoftqInit():
            dtype = storage_dtype(config.quantization, materials.resolved)
            restore_base(model, run, materials.base, config.quantization, dtype)
        case PissaInit() | OloraInit():
            restore_moved(model, run)


def _eva(model: Any, init: EvaInit, seed: int, materials: Materials, device: torch.device) -> None:
    """Let EVA look at `rows` training rows, drawn by ``seed`` and cut into micro-batches, in the precision of the run."""
    order = torch.randperm(len(materials.rows), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [materials.rows[index] for index in sorted(order[: init.rows])]
    resolved = materials.resolved
    scorer = Scorer(model, device, resolved.precision.value, resolved.tokens_per_device.value)
    batches = (collate([rows[index] for index in piece]).to(device) for piece in cut([len(row.ids) for row in rows], scorer.max_tokens))
    with scorer.autocast():
        apply_eva(model, ((batch.ids, batch.attention) for batch in batches))
