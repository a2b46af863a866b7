"""Micro-batches of one step computed side by side on a CPU, one core each.

A product of a few hundred rows is too small to be shared by cores: they meet after every one of some thousand operations of a step, and
small ones are not shared at all. Two lanes that each run half of the step by themselves meet once. torch releases the interpreter
during its operations, so threads suffice, and the weights are there once; processes (`finetune.training.forks`) are a little faster.

The gradient is that of the step, summed in an order that does not depend on which lane is ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from finetune.data.batches import cut
from finetune.data.examples import Ints
from finetune.model.adapters import count_parameters, trainable
from finetune.model.head import causal_model, has_plain_head
from finetune.model.quantize import is_int8
from finetune.model.tiles import TILE
from finetune.planning.lanes import LARGEST_SHARE
from finetune.scoring import Scorer

_LEAST_TOKENS = 128
"""Of a lane: with fewer rows, a product takes longer for each (330 instead of 400 GFLOP/s at 128 rows, bf16)."""
_RATE_OF_TILES = 0.5
"""Of the rate of other products: theirs are small, and their softmax is a pass besides. Fitted over 50 lanes of SmolLM2: 4.4 tokens a pair
where the products alone would be 2.0, and 0.33 tokens a supervised one where the head's would be 0.27."""

Lane = list[list[int]]
"""Micro-batches that are computed one after the other."""
Parameters = Sequence[torch.nn.Parameter]
Losses = Callable[[list[int]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Computed:
    """A lane's part of a step."""

    loss: torch.Tensor
    gradients: list[torch.Tensor]
    """As many as parameters; only those at ``reached`` places mean anything."""
    reached: set[int]


Submit = Callable[[int, Lane, int], Callable[[], Computed]]
"""Begin the lane at a place beside this one, with so many threads; what is returned waits for it, or raises what it raised."""


def can_share(scorer: Scorer, processes: int) -> bool:
    """Whether lanes give the gradient that one would: nothing is drawn, and nothing but gradients is written while a model runs."""
    if scorer.device.type != "cpu" or processes > 1 or not scorer.packed:
        return False
    training = sum(parameter.numel() for parameter in trainable(scorer.model).values())
    if training > LARGEST_SHARE * count_parameters(scorer.model) or not has_plain_head(causal_model(scorer.model)):
        return False
    return not any(
        _draws(module) or _is_rewritten(module) or getattr(module, "gradient_checkpointing", False) for module in scorer.model.modules()
    )


def _draws(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0


def _is_rewritten(module: Any) -> bool:
    """DoRA asks for the weight's values; PEFT, to read one of 8 bits on a CPU, puts a new parameter in its place, in every pass."""
    return bool(getattr(module, "lora_magnitude_vector", None)) and is_int8(module.get_base_layer())


@dataclass(frozen=True, slots=True)
class Work:
    """What examples cost a model, in tokens that only pass through its blocks."""

    supervised: float
    """Of a supervised token, besides: the head."""
    pair: float
    """Of a tile of queries with a tile of keys."""

    @classmethod
    def of(cls, model: Any) -> Work:
        """By products: a weight takes two operations forward and two for the gradient of what goes in, a pair six products of its tiles."""
        causal = causal_model(model)
        head = causal.get_output_embeddings().weight
        embeddings = {causal.get_input_embeddings().weight, head}
        blocks = count_parameters(causal) - sum(weight.numel() for weight in embeddings)
        config = causal.config.get_text_config()
        width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        pair = 6 * 2 * TILE**2 * width * config.num_hidden_layers / (4 * blocks)
        return cls(head.numel() / blocks, pair / _RATE_OF_TILES)

    def tokens(self, length: int, supervised: int) -> int:
        """The cost of an example of ``length`` tokens, ``supervised`` of them."""
        tiles = -(-length // TILE)
        return round(length + self.supervised * supervised + self.pair * tiles * (tiles + 1) / 2)


def split(
    indices: Sequence[int], lengths: Sequence[int] | Ints, max_tokens: int, threads: int, costs: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """``indices`` shared over at most ``threads`` lanes of even cost, each cut into micro-batches of its share of ``max_tokens``.

    ``costs`` are those of ``indices``, in tokens; else every token costs the same. One lane where an example would not fit in the share,
    so that no more tokens are ever computed at a time; its cut is the usual one.
    """
    chosen = {index: int(lengths[index]) for index in indices}
    weights = chosen if costs is None else dict(zip(indices, costs, strict=True))
    count = min(threads, len(indices), max(1, sum(chosen.values()) // _LEAST_TOKENS), max(1, max_tokens // max(chosen.values())))
    lanes: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(indices, key=lambda index: -weights[index]):
        min(lanes, key=lambda lane: _total(lane, weights)).append(index)
    return [_cut(lane, chosen, max_tokens // count) for lane in _evened(lanes, weights)]


def _total(lane: Sequence[int], weights: dict[int, int]) -> int:
    return sum(weights[index] for index in lane)


def _evened(lanes: list[list[int]], weights: dict[int, int]) -> list[list[int]]:
    """``lanes`` of the same examples, the dearest and the cheapest parted as evenly as can be until that changes nothing.

    All wait for the dearest: of eight examples of varied length, sharing out by length alone leaves it 4 % above the mean, this 2 %.
    """
    while len(lanes) > 1:
        order = sorted(lanes, key=lambda lane: _total(lane, weights))
        least, most = order[0], order[-1]
        parted = _halves([*least, *most], weights)
        if max(_total(half, weights) for half in parted) >= _total(most, weights):
            break
        lanes = [*order[1:-1], *parted]
    return lanes


def _halves(indices: list[int], weights: dict[int, int]) -> list[list[int]]:
    """``indices`` in two whose weights differ least: every sum that some of them have is a bit of a number."""
    reached = [1]
    for index in indices:
        reached.append(reached[-1] | reached[-1] << weights[index])
    whole = _total(indices, weights)
    left = next(total for total in range(whole // 2, -1, -1) if reached[-1] >> total & 1)
    halves: list[list[int]] = [[], []]
    for index, before in reversed(list(zip(indices, reached, strict=False))):
        inside = left >= weights[index] and bool(before >> (left - weights[index]) & 1)
        halves[not inside].append(index)
        left -= inside * weights[index]
    return halves


def _cut(lane: list[int], lengths: dict[int, int], max_tokens: int) -> list[list[int]]:
    pieces = cut([lengths[index] for index in lane], max_tokens, packed=True)
    return [[lane[place] for place in piece] for piece in pieces]


def run_lanes(lanes: Sequence[Lane], loss_of: Losses, parameters: Parameters, submit: Submit | None = None) -> torch.Tensor:
    """Set the gradients of the sum of ``loss_of`` over all micro-batches; returns that sum.

    Each lane has its share of torch's threads, the first of them in the thread of the caller, the others where ``submit`` has them
    computed: in threads of this process if that is left out. What a lane raises, this raises, when all threads have ended;
    who has other processes compute ends them.
    """
    threads = torch.get_num_threads()
    own = max(1, threads // len(lanes))

    def run(lane: Lane) -> Computed:
        torch.set_num_threads(own)  # of this thread; MKL knows one number alone, hence below
        return accumulated(lane, loss_of, parameters, [torch.empty_like(parameter) for parameter in parameters])

    try:
        with ThreadPoolExecutor(max(1, len(lanes) - 1)) as others:
            begin = submit or (lambda _place, lane, _threads: others.submit(run, lane).result)
            started = [begin(place, lane, own) for place, lane in enumerate(lanes[1:])]
            results = [run(lanes[0]), *(result() for result in started)]
    finally:
        torch.set_num_threads(threads)
    first, *rest = results
    for other in rest:
        _add(first.gradients, first.reached, {place: other.gradients[place] for place in other.reached})
    for place, parameter in enumerate(parameters):
        parameter.grad = first.gradients[place] if place in first.reached else None
    return torch.stack([each.loss for each in results]).sum()


def accumulated(lane: Lane, loss_of: Losses, parameters: Parameters, gradients: list[torch.Tensor]) -> Computed:
    """Loss and gradients of one lane; the latter are written to ``gradients``.

    These were there before the first pass. The tensors that autograd gives lie between what the pass had kept: were they to stay, nothing
    large would find room there in the next pass.
    """
    computed = Computed(torch.zeros(()), gradients, set())
    for piece in lane:
        loss = loss_of(piece)
        computed.loss.add_(loss.detach())
        _add(gradients, computed.reached, dict(enumerate(torch.autograd.grad(loss, parameters, allow_unused=True))))
        del loss  # what it kept, before the next pass
    return computed


def _add(gradients: Sequence[torch.Tensor], reached: set[int], found: Mapping[int, torch.Tensor | None]) -> None:
    """Add what was ``found`` at each place to ``gradients``, of which those at places that were not ``reached`` yet hold nothing."""
    for place, gradient in found.items():
        if gradient is not None:
            gradients[place].add_(gradient) if place in reached else gradients[place].copy_(gradient)
            reached.add(place)
