"""The frozen base spread over the devices: each keeps its share of every block and gathers one block at a time (FSDP2).

Only what does not train is sharded. The adapter stays whole on every device and its gradients are summed once a step, exactly as without
sharding, so that optimizers, clipping, checkpoints and the order of samples do not know of it (docs/adr/0022). Embeddings, the last norm
and the output head stay whole too: they are used outside of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from finetune.errors import ConfigError
from finetune.model.head import backbone, causal_model


def blocks_of(model: Any) -> list[nn.Module]:
    """The transformer blocks of ``model``, a causal language model with or without an adapter; ConfigError where it has none."""
    lists: list[nn.ModuleList] = [module for module in backbone(causal_model(model)).modules() if isinstance(module, nn.ModuleList)]
    largest = max(lists, key=_size, default=None)
    if not largest:
        raise ConfigError("this model has no list of blocks to share out", where="distributed.strategy: fsdp", fix="use `strategy: ddp`")
    return list(largest)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shard(model: Any, device: torch.device, world: int, *, offload: bool) -> None:
    """Spread the frozen weights of ``model``'s blocks over ``world`` processes and put the rest on ``device``.

    ``model`` is complete and on the host or on ``device``; it computes the same afterwards. Every process must from now on run the same
    number of forward and backward passes. ``offload`` keeps the shares in host memory. Raises ConfigError for a model without blocks.
    """
    mesh = init_device_mesh(device.type, (world,))
    policy: OffloadPolicy = CPUOffloadPolicy() if offload else OffloadPolicy()
    blocks = blocks_of(model)
    for block in blocks:
        block.to(device)
        quantized = [module for module in block.modules() if isinstance(module, bnb.nn.Linear4bit)]
        for linear in quantized:
            # plain bytes: what they stand for is on the module, and a gathered weight gets it back from there
            linear.quant_state = linear.weight.quant_state
            linear.weight = nn.Parameter(linear.weight.data, requires_grad=False)
        fully_shard(block, mesh=mesh, offload_policy=policy, ignored_params=_trainable(block))
        if quantized:
            # FSDP's own hook, which gathers the block, runs before this one
            block.register_forward_pre_hook(_state_returner(quantized))
    body = backbone(causal_model(model))
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = [parameter for parameter in body.parameters() if id(parameter) not in inside]
    for parameter in [*rest, *(p for p in model.parameters() if id(p) not in inside)]:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    # without weights of its own: as their root it lets the next block be gathered while one computes
    fully_shard(body, mesh=mesh, offload_policy=policy, ignored_params=set(rest))


def _trainable(module: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if parameter.requires_grad}


def _state_returner(linears: list[Any]) -> Callable[[nn.Module, object], None]:
    def give_back(_block: nn.Module, _inputs: object) -> None:
        for linear in linears:
            linear.weight.quant_state = linear.quant_state

    return give_back
