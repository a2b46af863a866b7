"""Cross-entropy over supervised positions only, in chunks, so that memory does not grow with vocabulary x length.

Three kinds of heads, told apart by a measurement: a plain product with the hidden states; the model's own forward without its body, for
those that scale or cap their logits; and the whole forward at the supervised positions, for a model that cannot be taken apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from finetune.model.frozen_head import fits, frozen_head_losses
from finetune.model.packing import compiles, is_packed, packed_inputs
from finetune.model.virtual import forward_inputs, virtual_tokens

CHUNK = 256
"""Positions whose logits exist at a time: 131 MB in fp32 for a vocabulary of 128,256, and three more such tensors in the backward pass."""

Kind = Literal["plain", "own", "whole"]

_TOLERANCE = 1e-3
"""Relative difference of logits that the rounding of one type explains."""

_PROBE_SCALE = 100.0
"""Size of the largest logit in the measurement: a soft cap at 30 bends it by 70 %, where a small model's own logits of 0.1 hide it."""

_kinds: WeakKeyDictionary[torch.nn.Module, Kind] = WeakKeyDictionary()


def causal_model(model: Any) -> Any:
    """The causal language model inside a PEFT model, or ``model`` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: Any) -> Any:
    """The decoder below the head of a causal language model."""
    return getattr(model, model.base_model_prefix)


def head_kind(model: Any) -> Kind:
    """How logits come from hidden states: ``plain``, just ``head(hidden)``; ``own``, by the model's forward without its body; or ``whole``.

    Measured once a model, since there are too many names for scales and caps to list; its mode and the random state stay as they were.
    """
    if model not in _kinds:
        _kinds[model] = _measure_head(model)
    return _kinds[model]


def has_plain_head(model: Any) -> bool:
    """Whether logits are just ``head(hidden)``."""
    return head_kind(model) == "plain"


def _measure_head(model: Any) -> Kind:
    """Whether the head reads the backbone's hidden states as they are, and its output is the model's logits."""
    body, head = getattr(model, model.base_model_prefix or "-", None), model.get_output_embeddings()
    if body is None or body is model or head is None:
        return "whole"
    seen: dict[str, torch.Tensor] = {}

    def after_body(_module: torch.nn.Module, _args: object, output: Any) -> None:
        seen["hidden"] = output[0]

    def after_head(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        seen["read"] = args[0]
        seen["written"] = output * (_PROBE_SCALE / output.float().abs().max().clamp_min(1e-6))
        return seen["written"]

    with ExitStack() as stack:
        for hook in (body.register_forward_hook(after_body), head.register_forward_hook(after_head)):
            stack.callback(hook.remove)
        logits = _probe(model, head)
        if len(seen) == 3 and _agree(seen["hidden"], seen["read"]) and _agree(seen["written"], logits):
            return "plain"
        if "hidden" not in seen:
            return "whole"
        with _without_body(model):
            return "own" if _agree(_probe(model, head, seen["hidden"]), logits) else "whole"


@contextmanager
def _without_body(model: Any) -> Iterator[None]:
    """Inside the block, ``model`` is its head alone: what comes in as embeddings is what its head reads as hidden states."""
    body = backbone(model)
    before = vars(body).get("forward")
    body.forward = _handed_on
    try:
        yield
    finally:
        del body.forward
        if before is not None:
            body.forward = before


def _handed_on(*_: Any, inputs_embeds: torch.Tensor, **__: Any) -> BaseModelOutputWithPast:
    return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


@torch.no_grad()
def _probe(model: Any, head: Any, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a few tokens, or of ``hidden``, in eval mode, without a trace left in ``model`` or the random state."""
    embedding = model.get_input_embeddings().weight
    device = embedding.device
    ids = torch.arange(min(8, len(embedding)), device=device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if hidden is None else {"inputs_embeds": hidden}
    modes = [(module, module.training) for module in model.modules()]
    half = head.weight.dtype in (torch.bfloat16, torch.float16)
    # A half-precision model may hold fp32 parts that need autocast. Its cache is off: weights are cast here without gradient, and older
    # versions of torch would hand them to the training step around.
    dtype = head.weight.dtype if half else torch.get_autocast_dtype(device.type)
    enabled = bool(half or torch.is_autocast_enabled(device.type))
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        with forked, torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False):
            logits: torch.Tensor = model.eval()(**inputs, use_cache=False).logits
    finally:
        for module, mode in modes:
            module.training = mode
    return logits


def _agree(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape:
        return False
    return bool((left.float() - right.float()).norm() <= _TOLERANCE * left.float().norm())


def accept_wide_inputs(head: torch.nn.Module | None) -> None:
    """Make ``head`` cast its input to its own type where autocast does not: fp32 embeddings below a bf16 head make fp32 hidden states."""
    if head is not None:
        head.register_forward_pre_hook(lambda module, args: (_fitting(args[0], module), *args[1:]))


def _fitting(hidden: torch.Tensor, head: Any) -> torch.Tensor:
    """``hidden`` in the type that ``head`` can multiply."""
    if torch.is_autocast_enabled(hidden.device.type) or not head.weight.is_floating_point():
        return hidden
    return hidden.to(head.weight.dtype)


def target_losses(model: Any, ids: torch.Tensor, attention: torch.Tensor, supervised: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every supervised token, in order of (row, position).

    Position p predicts token p+1, so the hidden states before the supervised tokens are gathered first and only they meet the head.

    Args:
        model: a causal language model, with or without an adapter; virtual tokens count as context, never as targets.
        ids: (b, t) int64 token ids, padded on the right. Where these three lie on the host, all that depends on their values is
            decided there, and the device is never waited for.
        attention: (b, t) int64, 1 where a token stands, 0 where padding does.
        supervised: (b, t) bool, True where the token is a target; the first column never counts.

    Returns:
        (n,) fp32 nats, n = number of supervised tokens.
    """
    core = causal_model(model)
    weight = core.get_input_embeddings().weight
    device = weight.device
    wanted = supervised[:, 1:]
    targets = _to(ids[:, 1:][wanted], device)
    if is_packed(core) and not virtual_tokens(model):
        inputs = {name: _to(value, device) for name, value in packed_inputs(ids, attention, few_shapes=compiles(weight)).items()}
        chosen = functional.pad(wanted, (0, 1))[attention.bool()][None]
    else:
        inputs, before = forward_inputs(model, _to(ids, device), _to(attention, device))
        chosen = functional.pad(wanted, (before, 1))
    kind = head_kind(core)
    if kind == "whole":
        return functional.cross_entropy(chosen_logits(core, inputs, chosen).float(), targets, reduction="none")
    hidden = backbone(core)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    hidden = hidden.index_select(0, _to(_numbers(chosen.flatten()), hidden.device))
    if kind == "own":
        return _in_chunks(hidden, targets, lambda rows: _own_logits(core, rows))
    return hidden_losses(hidden, core.get_output_embeddings(), targets)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def _numbers(chosen: torch.Tensor) -> torch.Tensor:
    """(n,) int64: where ``chosen`` (m,) is True."""
    return chosen.nonzero().squeeze(1)


def chosen_logits(core: Any, inputs: dict[str, Any], chosen: torch.Tensor) -> torch.Tensor:
    """Logits (n, v) at the n positions of ``chosen`` (b, t), of no column that has none where the model can leave them out."""
    options = {}
    if "logits_to_keep" in inspect.signature(core.forward).parameters:
        columns = _numbers(chosen.any(0))
        options = {"logits_to_keep": _to(columns, core.get_input_embeddings().weight.device)}
        chosen = chosen[:, columns]
    logits: torch.Tensor = core(**inputs, **options, use_cache=False).logits
    return logits.flatten(0, 1).index_select(0, _to(_numbers(chosen.flatten()), logits.device))


def _own_logits(core: Any, hidden: torch.Tensor) -> torch.Tensor:
    """(n, v) logits of hidden (n, d) as the model itself makes them."""
    with _without_body(core):
        logits: torch.Tensor = core(inputs_embeds=hidden[None], use_cache=False).logits[0]
    return logits


def hidden_losses(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Losses of hidden (n, d) against targets (n,), without the logits of more than one chunk at a time.

    Where the head trains, each chunk's logits are computed again in the backward pass.
    """
    if torch.is_grad_enabled() and fits(head):
        return frozen_head_losses(hidden, cast(torch.nn.Linear, head), targets)
    return _in_chunks(hidden, targets, lambda rows: cast(torch.Tensor, head(_fitting(rows, head))))


def _in_chunks(hidden: torch.Tensor, targets: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    def losses(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits_of(rows).float(), wanted, reduction="none")

    pieces = []
    for rows, wanted in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(losses, rows, wanted, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(losses(rows, wanted))
    return torch.cat(pieces)
