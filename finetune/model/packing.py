"""Examples laid end to end in one row: no padding is computed, and the result is that of each example alone.

Whether a model can be run so is measured, not read off its name: a model that does not hand the borders down to its attention, or asks
for something that the packed attention does not do, gives other hidden states in the probe and stays padded.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch.nn import functional

from finetune.model.attention import KERNELS, NAME, register

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Relative difference of hidden states that rounding explains; mixed-up examples differ by about 1."""

_packed: WeakSet[torch.nn.Module] = WeakSet()


def enable_packing(core: Any) -> bool:
    """Run ``core``, a causal language model, packed from now on where that is exact; returns whether it is."""
    if core.device.type not in KERNELS or not core.base_model_prefix:
        return False
    before = core.config._attn_implementation
    register()
    try:
        core.set_attn_implementation(NAME)
        exact = _is_exact(core)
    except (NotImplementedError, TypeError, ValueError, RuntimeError):
        # Raised inside the model's own code, on 24 tokens: a feature that packed attention refuses, a keyword that its forward does not
        # take, a mask of another shape. Not an error of the run: it goes on padded, as the line `kernels` of its header says.
        exact = False
    if exact:
        _packed.add(core)
    else:
        core.set_attn_implementation(before)
    return exact


def is_packed(core: Any) -> bool:
    """Whether `enable_packing` found ``core`` fit."""
    return core in _packed


def packed_inputs(ids: torch.Tensor, attention: torch.Tensor, *, few_shapes: bool = False) -> dict[str, Any]:
    """Arguments for a backbone that stand for ``ids`` (b, t) without its padding: one row of sum(attention) tokens.

    ``attention`` (b, t) int64 is 1 where a token stands; padding is on the right. Names of arguments are those of transformers' flash
    attention. The longest example is taken to be t, so that nobody has to ask a device for it.

    With ``few_shapes`` the row is filled up to one of few lengths with tokens that belong to no example: see `compiles`.
    """
    lengths = attention.sum(dim=1)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    real = attention.bool()
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    filling = (0, filled(int(bounds[-1])) - int(bounds[-1]) if few_shapes else 0)
    return {
        "input_ids": functional.pad(ids[real], filling)[None],
        "position_ids": functional.pad(positions[real], filling)[None],
        "cu_seq_lens_q": bounds,
        "max_length_q": ids.shape[1],
        # four dimensions: transformers takes it for a finished mask and makes none; packed attention does not read it
        "attention_mask": torch.zeros((1, 1, 1, 1), device=ids.device),
    }


def compiles(weight: torch.Tensor) -> bool:
    """Whether a product with ``weight`` is compiled for its very shape: oneDNN does so for half precision on a CPU.

    Each shape costs 1 ms and 0.65 MB, of which 0.4 MB never come back, even for kernels that fell out of its cache (oneDNN in torch 2.13).
    """
    half = torch.is_autocast_enabled("cpu") or weight.dtype in (torch.bfloat16, torch.float16)
    return weight.device.type == "cpu" and half


def filled(rows: int) -> int:
    """The next of few lengths: multiples of 64, or of 16 where that would be much (a lane of `training.lanes` has some 300 tokens)."""
    step = 64 if rows > 512 else 16
    return -(-rows // step) * step


@torch.no_grad()
def _is_exact(core: Any) -> bool:
    body = getattr(core, core.base_model_prefix)
    vocabulary = core.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(24, device=core.device) * 7 % vocabulary).view(3, 8)
    attention = torch.ones_like(ids)
    attention[1, 5:] = 0
    attention[2, 2:] = 0
    weight = core.get_input_embeddings().weight
    few, real = compiles(weight), int(attention.sum())
    training = core.training
    core.eval()
    try:
        padded = body(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state[attention.bool()]
        packed = body(**packed_inputs(ids, attention, few_shapes=few), use_cache=False).last_hidden_state[0, :real]
        with torch.random.fork_rng([]):  # dropout of attention, which training alone asks for, is refused by an error
            core.train()
            body(**packed_inputs(ids, attention, few_shapes=few), use_cache=False)
    finally:
        core.train(training)
    return packed.shape == padded.shape and bool((packed - padded).float().norm() <= _TOLERANCE[weight.dtype] * padded.float().norm())
