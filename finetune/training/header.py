"""What a run says of itself before its first step."""

from __future__ import annotations

from typing import Any

import torch

from finetune.config.schema import Config
from finetune.hardware import host_memory
from finetune.model.adapters import count_parameters, trainable
from finetune.planning.resolve import Checkpointing
from finetune.training.build import Built
from finetune.training.metrics import Started
from finetune.training.records import Parts, Start

_WORDS: dict[Checkpointing, str] = {True: "on", False: "off", "offload": "on, offloaded to host memory"}


def _kernels(built: Built) -> tuple[str, str]:
    if built.accelerated is None:
        return "plain", "stated in train.kernels"
    return built.accelerated.summary, "where a probe of the model found them exact"


def _memory(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else host_memory()


def started(config: Config, parts: Parts, accelerator: Any, start: Start) -> Started:
    """Length, sizes, groups and every decision with its reason."""
    resolved, counts = parts.inputs.resolved, parts.inputs.data.counts
    return Started(
        steps=parts.inputs.steps,
        done=start.progress.step,
        trainable=sum(parameter.numel() for parameter in trainable(parts.built.model).values()),
        total=count_parameters(parts.built.model),
        groups=tuple(group.summary() for group in parts.groups),
        counts=counts,
        choices={
            "precision": (resolved.precision.value, resolved.precision.reason),
            "tokens a micro-batch": (str(resolved.tokens_per_device.value), resolved.tokens_per_device.reason),
            **({"strategy": (resolved.strategy.value, resolved.strategy.reason)} if accelerator.num_processes > 1 else {}),
            **({"optimizer": (resolved.optimizer.value, resolved.optimizer.reason)} if config.optimizer.method == "auto" else {}),
            "gradient checkpointing": (_WORDS[resolved.gradient_checkpointing.value], resolved.gradient_checkpointing.reason),
            "kernels": _kernels(parts.built),
            **({"compiled": (f"{parts.built.compiled} blocks", "stated in train.compile")} if parts.built.compiled else {}),
        },
        notes=(*start.notes, *parts.built.notes),
        device=f"{accelerator.num_processes} x {accelerator.device.type}, base {config.quantization.method}",
        device_bytes=_memory(accelerator.device),
    )
