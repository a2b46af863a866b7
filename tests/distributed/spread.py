"""Run by each of two processes: losses and gradients of a spread model against those of the same model whole, method by method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch.distributed.tensor import DTensor

from finetune.config.schema import Quantization, Tuning
from finetune.data.batches import Batch
from finetune.model.adapters import attach, trainable
from finetune.model.fast import accelerate
from finetune.model.head import target_losses
from finetune.model.load import load_base
from finetune.model.methods import Given
from finetune.training.distributed import is_spread
from finetune.training.sharding import shard

LORA = {"method": "lora", "rank": 4, "targets": "all-linear"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "lora": (LORA, {}, {"kernels": True}),
    "lora, plain arithmetic": (LORA, {}, {}),
    "lora, recomputed": (LORA, {}, {"kernels": True, "recompute": True}),
    "nf4": (LORA, {"method": "nf4"}, {"kernels": True}),
    "nf4, plain arithmetic, recomputed": (LORA, {"method": "nf4"}, {"recompute": True}),
    "fp4, no double quantization": (LORA, {"method": "fp4", "double_quant": False}, {"kernels": True}),
    "dora": (LORA | {"dora": True}, {}, {"kernels": True}),
    "embeddings": (LORA | {"embeddings": "full"}, {}, {"kernels": True}),
    "tied-lora": ({"method": "tied-lora", "rank": 4}, {}, {}),
    "vera": ({"method": "vera", "rank": 8}, {"method": "nf4"}, {}),
    "ia3": ({"method": "ia3"}, {"method": "nf4"}, {}),
    "houlsby": ({"method": "houlsby", "bottleneck": 8}, {"method": "nf4"}, {}),
    "norm": ({"method": "norm"}, {"method": "nf4"}, {}),
    "prompt": ({"method": "prompt", "tokens": 4}, {}, {}),
    "prefix": ({"method": "prefix", "tokens": 4}, {}, {}),
    "adalora": ({"method": "adalora", "rank": 2}, {}, {}),
}
"""(tuning, quantization, how) of each."""

CPU = torch.device("cpu")


def build(base: Path, case: str) -> Any:
    tuning, quantization, how = CASES[case]
    method = TypeAdapter(Tuning).validate_python(tuning)
    plain = load_base(base, TypeAdapter(Quantization).validate_python(quantization or {"method": "none"}), torch.float32, CPU)
    torch.manual_seed(1)
    model = attach(plain, method, Given(seed=1))
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable(model).values():  # starts of zero would hide half of the gradients
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    if how.get("kernels"):
        accelerate(model, method)
    if how.get("recompute"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def stored_bytes(model: torch.nn.Module) -> int:
    """What this process holds."""
    tensors = (parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in model.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def passes(model: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of two batches and the sum of their gradients."""
    torch.manual_seed(3)
    total = 0.0
    for _ in range(2):
        loss = target_losses(model, batch.ids, batch.attention, batch.supervised).sum()
        loss.backward()
        total += float(loss.detach())
    return total, {name: parameter.grad for name, parameter in trainable(model).items() if parameter.grad is not None}


def compare(base: Path, results: Path) -> None:
    """Write {case: figures} as RANK.json into ``results``."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ids = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(rank))  # each device has other tokens
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids).bool())
    found = {}
    for case in CASES:
        whole, spread = build(base, case), build(base, case)
        before = stored_bytes(spread)
        shard(spread, CPU, world, offload=False)
        after = stored_bytes(spread)
        (loss, wanted), (spread_loss, got) = passes(whole, batch), passes(spread, batch)
        assert wanted
        assert set(wanted) == set(got), case
        error = max(float((wanted[name] - got[name]).norm() / wanted[name].norm().clamp_min(1e-12)) for name in wanted)
        found[case] = {"loss": loss, "spread": spread_loss, "gradients": error, "bytes": [before, after], "is spread": is_spread(spread)}
    (results / f"{rank}.json").write_text(json.dumps(found))
