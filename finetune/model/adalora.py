"""AdaLoRA (2303.10512): LoRA as P Lambda Q with a falling rank budget, driven by the training loop.

PEFT has the modules and the allocation. Here are the parts that its trainer leaves to chance: the schedule in optimizer steps, the
orthogonality penalty once a step (so that the gradient still depends on the global batch alone), and a state that survives a resume.

Adapters are written in full, pruned singular values as zeros. PEFT would cut the pruned ones off by the pattern of the last pruning, and
with them whatever has grown back since.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, PeftType
from torch import Tensor

from finetune.config.schema import AdaLora
from finetune.errors import ConfigError, VerificationError
from finetune.planning.ranks import init_rank

FILE = "adalora.safetensors"
"""Smoothed importance of every weight, beside a checkpoint's optimizer state."""

_ADAPTER = "default"
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


def adalora_config(tuning: AdaLora, targets: list[str]) -> AdaLoraConfig:
    """PEFT's configuration; the schedule follows in `plan_ranks`, once the number of steps is known."""
    start = init_rank(tuning)
    if start <= tuning.rank:
        raise ConfigError(
            f"AdaLoRA starts at rank {start} and prunes to a mean of {tuning.rank}: there is nothing to prune",
            where="tuning.init_rank",
            fix=f"use init_rank: {math.ceil(1.5 * tuning.rank)}, or `method: lora`",
        )
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=start,
        target_r=tuning.rank,
        # PEFT divides by the rank at the start, whatever was pruned: the scale is to be alpha over the stated rank
        lora_alpha=tuning.alpha * start / tuning.rank,
        lora_dropout=tuning.dropout,
        target_modules=targets,
        orth_reg_weight=tuning.orthogonality,
        deltaT=tuning.every_steps,
        total_step=1,
    )


def is_adalora(model: Any) -> bool:
    """Whether ``model`` carries an AdaLoRA adapter."""
    return isinstance(model, PeftModel) and model.peft_config[_ADAPTER].peft_type == PeftType.ADALORA


def plan_ranks(model: Any, tuning: AdaLora, steps: int) -> None:
    """Lay the rank schedule over ``steps`` optimizer steps; ConfigError where they leave no room for pruning."""
    config = model.peft_config[_ADAPTER]
    warmup, final = int(tuning.warmup_ratio * steps), int(tuning.final_ratio * steps)
    if steps - final - warmup < 2:
        raise ConfigError(
            f"{steps} optimizer steps leave no room between AdaLoRA's warm-up ({warmup}) and its last phase ({final})",
            where="tuning.final_ratio",
            fix="lower warmup_ratio and final_ratio, or train for more steps",
        )
    config.total_step, config.tinit, config.tfinal = steps, warmup, final


def add_penalty(model: Any) -> None:
    """Add the gradient of weight x mean ||P^T P - I||_F + ||Q Q^T - I||_F (equation 4) to that of the whole batch."""
    weight = model.peft_config[_ADAPTER].orth_reg_weight
    if not weight:
        return
    terms = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            factor = parameter if ".lora_A." in name else parameter.T
            gram = (factor @ factor.T).float()
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
    (weight * torch.stack(terms).mean()).backward()


def update_ranks(model: Any, step: int) -> None:
    """After optimizer step number ``step`` (1-based), with gradients still there: take note of importance, prune where it is due."""
    model.base_model.update_and_allocate(step)


def pruned_whole(model: Any) -> set[str]:
    """Names of singular values that a module lost altogether: zero as at the start, and rightly so."""
    return {name for name, parameter in model.named_parameters() if ".lora_E." in name and not bool(parameter.any())}


def rank_state(model: Any) -> tuple[dict[str, Tensor], dict[str, list[bool]] | None]:
    """What a resumed run needs besides weights: averages by `NAME/WHICH`, and which singular values were kept when last pruned."""
    allocator = model.base_model.rankallocator
    tensors = {
        f"{name}/{which}": value.detach().cpu().contiguous() for which in _AVERAGES for name, value in getattr(allocator, which).items()
    }
    return tensors, model.peft_config[_ADAPTER].rank_pattern


def load_rank_state(model: Any, tensors: Mapping[str, Tensor], pattern: dict[str, list[bool]] | None) -> None:
    """Inverse of `rank_state`; VerificationError for averages of a weight that is not there."""
    allocator = model.base_model.rankallocator
    live = dict(model.get_base_model().named_parameters())
    allocator.reset_ipt()
    for key, value in tensors.items():
        name, _, which = key.rpartition("/")
        if name not in live or which not in _AVERAGES or live[name].shape != value.shape:
            raise VerificationError(f"{key} belongs to no weight of this model", where=FILE, fix="resume with the same configuration")
        getattr(allocator, which)[name] = value.to(live[name].device)
        allocator.ipt.setdefault(name, torch.zeros_like(live[name]))
    model.peft_config[_ADAPTER].rank_pattern = pattern


@contextmanager
def whole_ranks(model: PeftModel) -> Iterator[None]:
    """Inside the block, PEFT reads and writes the adapter in full, whatever was pruned. Other methods are left as they are."""
    config = model.peft_config[_ADAPTER]
    if not is_adalora(model):
        yield
        return
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern
