"""How many tokens a micro-batch may have on a GPU: measured on the longest examples, before the first step.

Memory of a pass is nearly a line in its tokens, so two passes tell what a third may hold. That third is run as well: what has run on the
longest examples once will not fail in the middle of the night.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from finetune.data.batches import collate, cut
from finetune.data.examples import Examples
from finetune.errors import HardwareError
from finetune.model.head import target_losses
from finetune.planning.resolve import Choice
from finetune.scoring import Scorer

MOST = 32768
"""Tokens beyond which a larger micro-batch is no faster."""
_SHOWN = 200
"""Characters of an error of torch, which goes on with advice of its own."""
_SHARE = 0.9
"""Of the free memory: the rest is for what the allocator cannot use."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass."""

    tokens: int
    """Tokens that were computed, padding included."""
    bytes: int
    """Its peak above what lies on the device anyway."""


Measure = Callable[[int], Pass]
"""Run a micro-batch of the longest examples with at most so many tokens, and at least one example; raises torch.OutOfMemoryError."""


def affordable(short: Pass, long: Pass, free: int) -> int:
    """The most tokens whose peak lies within a share of ``free`` bytes, on the line through two passes; never fewer than ``short``."""
    slope = (long.bytes - short.bytes) / max(1, long.tokens - short.tokens)
    if slope <= 0:
        return MOST
    return max(short.tokens, min(MOST, int(short.tokens + (_SHARE * free - short.bytes) / slope)))


def find_budget(measure: Measure, free: int, longest: int) -> Choice[int]:
    """The tokens of a micro-batch on a device with ``free`` bytes, for examples of up to ``longest`` tokens.

    What the line promises is tried. Where it does not fit, half of it is, once; HardwareError (exit 4) where that does not fit either.
    """
    try:
        short = measure(longest)
    except torch.OutOfMemoryError as error:
        raise _too_long(longest) from error
    try:
        budget = affordable(short, measure(2 * longest), free)
    except torch.OutOfMemoryError:
        return Choice(longest, "the longest example fits, and two of its length do not (measured)")
    if budget <= 2 * longest:
        return Choice(max(longest, budget), f"as much as {free / 2**30:.1f} GiB hold, measured on the longest examples")
    try:
        measure(budget)
    except torch.OutOfMemoryError:
        return _halved(measure, budget, longest)
    return Choice(budget, f"as much as {free / 2**30:.1f} GiB hold, measured on the longest examples")


def _halved(measure: Measure, budget: int, longest: int) -> Choice[int]:
    half = max(longest, budget // 2)
    try:
        measure(half)
    except torch.OutOfMemoryError as error:
        raise HardwareError(
            f"memory ran out with micro-batches of {budget} and of {half} tokens: {what_ran_out(error)}",
            where="train.tokens_per_device",
            fix=f"set it: -o train.tokens_per_device={2 * longest}, which fitted",
        ) from error
    return Choice(half, f"half of {budget}, which the measurement promised and the device did not hold")


def what_ran_out(error: torch.OutOfMemoryError) -> str:
    """What ran out: the device, or the host memory in which hidden states wait."""
    return str(error).partition("\n")[0][:_SHOWN] or "out of memory"


def _too_long(longest: int) -> HardwareError:
    return HardwareError(
        f"one example of {longest} tokens does not fit on the device",
        where="data.max_tokens",
        fix="lower it, or set quantization.method: nf4, train.gradient_checkpointing: true or, beyond that, offload",
    )


@dataclass(frozen=True, slots=True)
class Gpu:
    """Passes of a model on the GPU that it lies on; nothing of them stays, gradients included."""

    scorer: Scorer
    examples: Examples

    def __call__(self, tokens: int) -> Pass:
        """Run the first micro-batch that a step over all examples would be cut into."""
        device, model = self.scorer.device, self.scorer.model
        piece = cut(self.examples.lengths.tolist(), tokens, packed=self.scorer.packed)[0]
        batch = collate([self.examples[index] for index in piece])
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            model.train()
            with self.scorer.autocast():
                target_losses(model, batch.ids, batch.attention, batch.supervised).mean().backward()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)
            peak = torch.cuda.max_memory_allocated(device) - before
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return Pass(int(batch.attention.sum()) if self.scorer.packed else batch.ids.numel(), peak)

    def free(self, states: int) -> int:
        """Bytes for passes, when the optimizer will take ``states`` of them in the first step."""
        unused = torch.cuda.memory_reserved(self.scorer.device) - torch.cuda.memory_allocated(self.scorer.device)
        return max(0, torch.cuda.mem_get_info(self.scorer.device)[0] + unused - states)


def probe_gpu(scorer: Scorer, examples: Examples) -> Choice[int]:
    """The budget of `train.tokens_per_device: auto` on the GPU that the model of ``scorer`` lies on."""
    gpu = Gpu(scorer, examples)
    states = sum(2 * 4 * parameter.numel() for parameter in scorer.model.parameters() if parameter.requires_grad)  # AdamW's two, in fp32
    return find_budget(gpu, gpu.free(states), int(examples.lengths.max()))
