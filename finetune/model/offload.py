"""Activation offload: what checkpointed blocks keep of a forward pass waits in host memory until the backward pass computes them again.

With checkpointing alone a block keeps its input, hidden states (b, t, h), on the device: L t h scalars for a micro-batch of t tokens, 5 GiB
for 70B at 4,096. Here they leave the device when their block begins and come back, one block's at a time, when it is computed again.

torch's checkpoint without reentrance saves the positional arguments of a block, before it takes over what is saved inside of it. A pair
of saved-tensor hooks around it therefore sees those alone; masks, positions and rotations are keyword arguments of a block in
transformers, which all blocks share. Copies run on the stream that computes, in order: nothing has to be waited for, and memory that is
given back is not written to too early. They take little beside the products of a block (docs/adr/0031).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from finetune.planning.offload import pinned_bytes

_FUNCTION = "_gradient_checkpointing_func"
"""Where the modules of transformers keep what they call to be checkpointed."""


class Held:
    """Hidden states outside of the device that they were computed on."""

    __slots__ = ("__weakref__", "copy", "device", "size")

    def __init__(self, copy: Tensor, device: torch.device, size: int) -> None:
        self.copy = copy
        self.device = device
        self.size = size
        """Bytes that the copy takes where it lies."""


class Store(Protocol):
    """Where hidden states wait."""

    def put(self, hidden: Tensor) -> Held | None:
        """A copy of ``hidden`` (b, t, h); None where it is to stay where it is."""

    def take(self, held: Held) -> Tensor:
        """The hidden states of ``held`` on the device that they came from."""


class PinnedMemory:
    """Host memory that a GPU reads and writes without the processor; hidden states of a CPU stay where they are."""

    def __init__(self, room: int, kind: str = "cuda") -> None:
        """``room``: bytes that may be held at a time; ``kind``: of the devices whose hidden states are."""
        self.room = room
        self.kind = kind
        self._held: WeakSet[Held] = WeakSet()

    def put(self, hidden: Tensor) -> Held | None:
        """torch.OutOfMemoryError beyond ``room``, as for a device: whoever measures or sizes micro-batches makes them smaller."""
        if hidden.device.type != self.kind:
            return None
        size = pinned_bytes(hidden.numel() * hidden.element_size())
        if sum(held.size for held in self._held) + size > self.room:
            raise torch.OutOfMemoryError(f"the hidden states of this micro-batch take more than {self.room / 2**30:.1f} GiB of host memory")
        try:
            copy = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        except RuntimeError as error:  # of pinning alone: the driver refuses it
            raise torch.OutOfMemoryError(f"host memory cannot be pinned for hidden states: {error}") from error
        held = Held(copy.copy_(hidden, non_blocking=True), hidden.device, size)
        self._held.add(held)
        return held

    def take(self, held: Held) -> Tensor:
        """On the stream that computes, and so after the copy to the host and before the block."""
        return held.copy.to(held.device, non_blocking=True)


def checkpoint_blocks(model: Any, store: Store | None = None) -> None:
    """Compute every block of ``model`` again in the backward pass; its input waits in ``store``, or where it was computed."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers makes embeddings ask for a gradient, which reentrant checkpoints need: the first block's input would stay for it
    model.disable_input_require_grads()
    if store is not None:
        for module in model.modules():
            if hasattr(module, _FUNCTION):
                setattr(module, _FUNCTION, _Offloading(getattr(module, _FUNCTION), store))


class _Offloading:
    """Calls ``checkpoint``, and moves the first argument of the block, which are its hidden states, while they are saved for it."""

    def __init__(self, checkpoint: Callable[..., Any], store: Store) -> None:
        self._checkpoint = checkpoint
        self._store = store

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``block`` returns for ``args``."""
        store, wanted = self._store, _identity(args[0]) if args and isinstance(args[0], Tensor) else None

        def put(saved: Tensor) -> Tensor | Held:
            # Autograd hands over a detached tensor, and keeps this function: were the hidden states themselves in it, they would stay.
            held = store.put(saved) if _identity(saved) == wanted else None
            return saved if held is None else held

        def take(kept: Tensor | Held) -> Tensor:
            return store.take(kept) if isinstance(kept, Held) else kept

        with saved_tensors_hooks(put, take):
            return self._checkpoint(block, *args, **kwargs)


def _identity(tensor: Tensor) -> tuple[int, torch.Size]:
    """Where ``tensor`` lies, and its shape: what tells it from others that live at the same time, without keeping it."""
    return tensor.data_ptr(), tensor.shape
