"""An adapter as a plain LoRA of one rank and scale 1 on a stated base, which every serving engine reads.

Engines know less than PEFT does: no DoRA, no whole copies of modules, no ranks or scales that differ from module to module (vLLM reads
`rank_pattern` and `alpha_pattern` without complaint and ignores them). So s goes into B, all ranks are filled up with zeros to the largest
one, and alpha = r. What is a low-rank update is converted exactly:

    LoRA, rsLoRA   s B A                      LoftQ on the original base   s (B A - B0 A0), rank 2r
    AdaLoRA        s P diag(e) Q              VeRA                         diag(b) B diag(d) A

DoRA and IA3 scale the whole weight: W' - W has full rank, and its best approximation of a chosen rank is written (SVD), with its error.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from finetune.errors import ConfigError
from finetune.merging.adapter import CONFIG, WEIGHTS, located
from finetune.merging.fitting import require_fitting
from finetune.merging.fold import base_values
from finetune.merging.inputs import Inputs, MergeSource, open_inputs
from finetune.merging.updates import LowRankUpdate, Scaling, SharedUpdate, SingularUpdate, Update
from finetune.model.correction import Factors
from finetune.model.low_rank import low_rank, padded
from finetune.model.pissa import difference

_RANK = 16
"""Where to start with an adapter that has no rank of its own."""


@dataclass(frozen=True, slots=True)
class PlainReport:
    """What was written."""

    rank: int
    """Of every module; the scale is 1."""
    modules: int
    error: float
    """Largest relative error ||delta - BA|| / ||delta|| of a module; 0.0 where the conversion is exact."""
    size: int
    """Bytes of all tensors."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The update of one module, B A or for an embedding (B A)^T."""

    b: Tensor
    a: Tensor
    embedding: bool = False
    error: float = 0.0


def needed_rank(source: MergeSource) -> int | None:
    """The rank to start from where the adapter of ``source`` must be approximated: its own; None where it is converted exactly."""
    with ExitStack() as stack:
        updates = open_inputs(source, stack).adapter.updates.values()
        if not any(map(_is_dense, updates)):
            return None
        return max((update.rank for update in updates if isinstance(update, LowRankUpdate)), default=_RANK)


@torch.no_grad()
def write_plain(source: MergeSource, destination: Path, rank: int, dtype: torch.dtype) -> PlainReport:
    """Write the adapter of ``source`` into the directory ``destination``; ``rank`` is that of what has to be approximated.

    ConfigError where the adapter holds what no LoRA can, with what to do instead; VerificationError as for `fold`.
    """
    with ExitStack() as stack:
        inputs = open_inputs(source, stack)
        _require_expressible(inputs)
        require_fitting(inputs)
        with located(str(source.adapter_dir)):
            parts = {module: _part(inputs, module, update, rank) for module, update in inputs.adapter.updates.items()}
        inputs.adapter.require_all_taken()
        names = set(inputs.weights.info)
    widest = max(part.a.shape[0] for part in parts.values())
    tensors = {}
    for module, part in parts.items():
        b, a = padded(part.b, part.a, widest)
        ends = (".lora_embedding_A", ".lora_embedding_B") if part.embedding else (".lora_A.weight", ".lora_B.weight")
        for end, factor in zip(ends, (a, b), strict=True):
            tensors[f"base_model.model.{module}{end}"] = factor.to("cpu", dtype).contiguous()
    base_name = json.loads((source.adapter_dir / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    config = LoraConfig(
        r=widest,
        lora_alpha=widest,
        target_modules=targets_of(set(parts), names),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    config.save_pretrained(str(destination))
    save_file(tensors, destination / WEIGHTS, {"format": "pt"})
    error = max(part.error for part in parts.values())
    return PlainReport(widest, len(parts), error, sum(tensor.nbytes for tensor in tensors.values()))


def _require_expressible(inputs: Inputs) -> None:
    """ConfigError for what a LoRA cannot hold, or what the stated base would not be."""
    adapter, source = inputs.adapter, inputs.source
    scaled = [name for name in inputs.weights.info if name.endswith(".bias") and name in adapter.touched([name])]
    corrected = inputs.corrections is not None and any(
        inputs.corrections.read(module).base is not None for module in inputs.corrections.modules
    )
    what, fix = "", "merge instead: `--to safetensors`"
    if source.new_ids:
        what = "the run added tokens, whose rows serving engines do not take from an adapter"
    elif adapter.rows or adapter.copies:
        what = f"{next(iter([*adapter.rows, *adapter.copies]))} was trained as a whole, which no LoRA can hold"
    elif scaled:
        what = f"{scaled[0]} is scaled, and a LoRA changes weights only"
    elif corrected and source.base == "dequantized":
        what = "LoftQ with several iterations changed the quantized base, which no engine can rebuild"
        fix = "export for the unquantized base: `--to adapter --base original`, or merge: `--to safetensors`"
    if what:
        raise ConfigError(f"the adapter cannot be exported as a plain LoRA: {what}", where=str(source.adapter_dir), fix=fix)


def _is_dense(update: Update) -> bool:
    return isinstance(update, Scaling) or (isinstance(update, LowRankUpdate) and update.magnitude is not None)


def _part(inputs: Inputs, module: str, update: Update, rank: int) -> _Part:
    name = f"{module}.weight"

    def take(key: str) -> Tensor:
        return inputs.adapter.take(key, name).to(inputs.source.device)

    match update:
        case LowRankUpdate(magnitude=None):
            trained = Factors(take(update.a), take(update.b), update.scale)
            corrections = inputs.corrections if inputs.source.base == "original" else None
            if corrections is not None and module in corrections.modules:
                trained = difference(trained, corrections.read(module).start)
            return _Part(trained.b * trained.scale, trained.a, update.embedding)
        case SingularUpdate():
            return _Part(take(update.b) * update.scale, take(update.a) * take(update.e))
        case SharedUpdate():
            rows, columns = inputs.weights.info[name].shape
            return _no_wider(take(update.outer)[:, None] * take(update.b)[:rows], take(update.inner)[:, None] * take(update.a)[:, :columns])
        case _:
            return _approximated(inputs, module, update, rank)


def _no_wider(b: Tensor, a: Tensor) -> _Part:
    """B A with a rank that is no larger than its smaller side: VeRA's is the same for all modules, however narrow."""
    smaller = min(b.shape[0], a.shape[1])
    if a.shape[0] <= smaller:
        return _Part(b, a)
    short_b, short_a = low_rank((b.double() @ a.double()), smaller, exact=True)
    return _Part(short_b.float(), short_a.float())


def _approximated(inputs: Inputs, module: str, update: Update, rank: int) -> _Part:
    """The best approximation of W' - W of ``rank``."""
    name, source = f"{module}.weight", inputs.source
    stored = inputs.weights.read(name if name in inputs.weights.info else inputs.layout.embedding)
    before = base_values(inputs, name, stored, quantized=module in inputs.layout.quantized)

    def take(key: str) -> Tensor:
        return inputs.adapter.take(key, name).to(source.device)

    def corrected(found: Tensor) -> Tensor:
        if source.base == "original" and inputs.corrections is not None and module in inputs.corrections.modules:
            return inputs.corrections.read(module).start.added_to(found, -1.0)
        return found

    delta = update.on_weight(before.clone(), take, corrected) - before
    embedding = isinstance(update, LowRankUpdate) and update.embedding
    delta = delta.T if embedding else delta
    b, a = low_rank(delta, min(rank, *delta.shape))
    norm = float(delta.norm())
    return _Part(b, a, embedding, float((delta - b @ a).norm()) / norm if norm else 0.0)


def targets_of(modules: set[str], names: set[str]) -> list[str]:
    """Last names of ``modules`` where these mean no other module of the model, which engines read; else whole names."""
    weights = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    ends = {module.rpartition(".")[2] for module in modules}
    meant = {module for module in weights if module.rpartition(".")[2] in ends}
    return sorted(ends if meant <= modules else modules)
