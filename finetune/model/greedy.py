"""The greedy continuation of one prompt, while the model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from finetune.model.head import causal_model
from finetune.model.virtual import virtual_tokens


def _outside(give_up: Callable[[], bool]) -> Callable[..., torch.Tensor]:
    """What ends a continuation from outside."""

    def ended(input_ids: torch.Tensor, scores: object, **_: Any) -> torch.Tensor:
        del scores
        return torch.full((len(input_ids),), give_up(), dtype=torch.bool, device=input_ids.device)

    return ended


@torch.no_grad()
def continuation(
    model: Any,
    prompt: Sequence[int],
    ends: Sequence[int],
    max_tokens: int,
    give_up: Callable[[], bool] = lambda: False,
    *,
    in_step: bool = False,
) -> list[int]:
    """Up to ``max_tokens`` token ids after ``prompt``, to the first of ``ends``, which is not among them.

    Call it inside `undisturbed`. ``in_step``: every process calls it with the same prompt, and goes on with passes for nothing until all
    are done, since the blocks of ``model`` are shared out. When ``give_up`` is true, what there is so far is returned.
    """
    core = causal_model(model)
    ids = torch.tensor([list(prompt)], device=core.get_input_embeddings().weight.device)
    longest = getattr(core.config.get_text_config(), "max_position_embeddings", None)
    room = max_tokens if longest is None else max(1, min(max_tokens, longest - virtual_tokens(model) - len(prompt)))
    with _configured(core, GenerationConfig(max_new_tokens=room, do_sample=False, use_cache=True, **_ended_by(ends))):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=StoppingCriteriaList([_outside(give_up)]),
            synced_gpus=in_step,
        )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found[: next((place for place, token in enumerate(found) if token in ends), len(found))]


def _ended_by(ends: Sequence[int]) -> dict[str, Any]:
    return {"eos_token_id": list(ends) or None, "pad_token_id": ends[0] if ends else 0}


@contextmanager
def _configured(core: Any, config: GenerationConfig) -> Iterator[None]:
    """Inside the block ``core`` generates as ``config`` says: its own defaults, such as a repetition penalty, do not apply."""
    before = core.generation_config
    core.generation_config = config
    try:
        yield
    finally:
        core.generation_config = before


@contextmanager
def undisturbed(model: Any, device: torch.device) -> Iterator[None]:
    """Inside the block ``model`` is in eval mode; afterwards each of its modules is in its own mode, and the random state what it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
