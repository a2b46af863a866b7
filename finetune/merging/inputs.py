"""What a merge reads: the base, the adapter, LoftQ's correction, and how the base stood in training."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from finetune.config.schema import Quantization
from finetune.errors import ConfigError, VerificationError
from finetune.merging.adapter import Adapter
from finetune.merging.layout import Layout, read_layout
from finetune.model.correction import FILE as CORRECTION
from finetune.model.correction import Corrections
from finetune.model.packed import PackedWeights, open_weights
from finetune.model.weights import Weights

Base = Literal["dequantized", "original"]


@dataclass(frozen=True, slots=True)
class MergeSource:
    """What is merged, and how its base stood in training."""

    base_dir: Path
    """Directory of the original model: config.json and safetensors."""
    adapter_dir: Path
    """Directory that `PeftModel.save_pretrained` wrote."""
    quantization: Quantization
    """The run's `quantization`."""
    compute_dtype: torch.dtype
    """The type the base was loaded with and computed in."""
    adapter_dtype: torch.dtype = torch.float32
    """The type the adapter trained in, `train.trainable_dtype`."""
    base: Base = "dequantized"
    """What the update is added to."""
    loftq: bool = False
    """Whether the run's `tuning.init` was LoftQ, so that `loftq_base.safetensors` must be there."""
    new_ids: tuple[int, ...] = ()
    """Ids of the tokens that the run added."""
    end_ids: tuple[int, ...] = ()
    """Ids that end a reply, by the tokenizer and by the chat template: generation must stop there."""
    device: str = "cpu"
    """Where the arithmetic runs. Quantize where training did if the last bit of the base matters."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The open files of a merge."""

    source: MergeSource
    weights: Weights | PackedWeights
    adapter: Adapter
    corrections: Corrections | None
    layout: Layout


def open_inputs(source: MergeSource, stack: ExitStack) -> Inputs:
    """Open the files of ``source``, which ``stack`` closes; VerificationError where one is missing, damaged or not understood."""
    layout = read_layout(source.base_dir, source.quantization)
    weights = open_weights(source.base_dir, source.compute_dtype, source.device)
    stack.callback(weights.close)
    if isinstance(weights, PackedWeights):
        if source.base == "original":
            raise ConfigError(
                "the checkpoint is quantized: the original base is not on this machine",
                where=str(source.base_dir),
                fix="merge with --base dequantized and without --compare-bases",
            )
        layout = replace(layout, quantized=weights.modules)
    adapter = stack.enter_context(Adapter(source.adapter_dir))
    return Inputs(source, weights, adapter, _corrections(source, stack), layout)


def _corrections(source: MergeSource, stack: ExitStack) -> Corrections | None:
    """LoftQ's file must be there exactly where the run used LoftQ: without it the base would silently be another one."""
    path = source.adapter_dir / CORRECTION
    if path.is_symlink():
        raise VerificationError(f"{CORRECTION} is a symbolic link", where=str(source.adapter_dir), fix="copy the adapter's files")
    if source.loftq:
        return stack.enter_context(Corrections(source.adapter_dir))
    if path.exists():
        raise VerificationError(
            f"{CORRECTION} lies beside an adapter whose run did not use LoftQ",
            where=str(source.adapter_dir),
            fix="merge with the run's own config",
        )
    return None
