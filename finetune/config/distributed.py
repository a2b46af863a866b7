"""The section `distributed`."""

from __future__ import annotations

from typing import Literal

from finetune.config.section import Section


class Distributed(Section):
    """How several devices share the work. How many there are is said when the run is started: `--devices`, torchrun, srun."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """`ddp`: every device holds the (quantized) model and works on its share of each batch. `fsdp`: the frozen weights are spread over the
    devices besides, and gathered block by block. `auto`: `fsdp` where the model would not fit beside its activations."""
    offload: bool = False
    """With `fsdp` on GPUs: keep the spread weights in host memory, and copy each block to the GPU when it is used. Slower, smaller."""
