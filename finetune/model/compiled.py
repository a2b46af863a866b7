"""Decoder blocks that torch.compile turns into kernels of their own (`train.compile`), in training alone.

Validation and samples run the block as it is: their shapes are others, and what is measured there is what later commands compute.
Instances keep their modules and names; only `forward` of a block is replaced, as in `finetune.model.fast`. All blocks share the graphs,
and lengths are symbols in them, so that a new length compiles nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from finetune.errors import HardwareError
from finetune.model import attention
from finetune.model.head import backbone, causal_model

_COMPILERS = ("g++", "clang++")


def compile_blocks(model: Any, backend: str = "inductor") -> int:
    """Let the decoder blocks of ``model`` train as compiled kernels from now on, after all else that replaces a forward; how many.

    ``backend`` is torch.compile's. The first steps take a minute longer.
    """
    # Attention on a CPU goes from tile to tile by the lengths of the examples, which a graph would be compiled for.
    attention.KERNELS["cpu"] = _uncompiled(attention.KERNELS["cpu"])
    blocks = blocks_of(model)
    for block in blocks:
        block.forward = _forward_of(block, block.forward, backend)
    return len(blocks)


def blocks_of(model: Any) -> list[Any]:
    """The largest list of modules in the backbone of ``model``, a causal language model with or without an adapter."""
    lists = [module for module in backbone(causal_model(model)).modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda found: sum(parameter.numel() for parameter in found.parameters()), default=[]))


def require_compiler(kind: str) -> None:
    """HardwareError where torch.compile lacks what it needs on a device of ``kind``: a C++ compiler, and Triton on a GPU."""
    stated = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((stated,) if stated else _COMPILERS)):
        raise HardwareError(
            "`train.compile` needs a C++ compiler, and there is no " + (stated or " or ".join(_COMPILERS)),
            where="train.compile",
            fix="install one (apt-get install g++), or set `compile: false`",
        )
    if kind == "cuda" and find_spec("triton") is None:
        raise HardwareError(
            "`train.compile` needs Triton on a GPU", where="train.compile", fix="pip install triton, or set `compile: false`"
        )


def _forward_of(block: Any, otherwise: Callable[..., Any], backend: str) -> Callable[..., Any]:
    compiled = torch.compile(otherwise, dynamic=True, backend=backend)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training and torch.is_grad_enabled() else otherwise)(*args, **kwargs)

    return forward


def _uncompiled(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    if getattr(kernel, "_torchdynamo_disable", False):
        return kernel
    why = "its tiles depend on the lengths of the examples"
    found: Callable[..., torch.Tensor] = torch.compiler.disable(kernel, reason=why)  # type: ignore[no-untyped-call]
    return found
