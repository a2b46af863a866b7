"""The part of `benchmarks.plan` that needs an NVIDIA GPU.

Models of the sizes of Llama 3 8B and 70B with random weights, built on the GPU layer by layer, trained for two steps
through the functions that a run uses. Measured are the peak that torch's allocator handed out, which is compared with the plan's parts
without `process` and `reserve`, and the peak that it took from the device, compared with the total without `process`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.config.schema import Config
from finetune.hardware import Machine
from finetune.planning.memory import estimate_memory, setting_of
from finetune.planning.parameters import count_parameters
from finetune.planning.resolve import resolve
from finetune.planning.shapes import read_shape

_STEPS = 2


@dataclass(frozen=True, slots=True)
class GpuCase:
    """One model and one way to train it."""

    name: str
    sizes: tuple[int, int, int, int, int, int]
    """As `benchmarks.engine.gpu.llama` takes them."""
    base: str
    rank: int
    checkpointing: bool
    tokens: int

    def config(self) -> Config:
        """The run, as far as a plan reads it."""
        return Config.model_validate(
            {
                "model": {"id": "drawn/llama"},
                "quantization": {"method": self.base},
                "tuning": {"method": "lora", "rank": self.rank, "alpha": self.rank},
                "optimizer": {"method": "adamw"},
                "data": {"train": [{"source": "rows.jsonl"}], "max_tokens": self.tokens},
                "train": {"tokens_per_device": self.tokens, "precision": "bf16", "gradient_checkpointing": self.checkpointing},
                "output": "out",
            }
        )


def gpu_cases(tiny: bool) -> list[GpuCase]:
    """Three models; small ones with ``tiny``."""
    from benchmarks.engine.gpu import LLAMA_8B, LLAMA_70B

    small = (64, 128, 2, 4, 2, 512)
    eight, seventy, tokens = (small, small, 64) if tiny else (LLAMA_8B, LLAMA_70B, 4096)
    return [
        GpuCase("8B, bf16, rank 16, checkpointing off", eight, "none", 16, False, tokens // 2),
        GpuCase("8B, NF4, rank 64, checkpointing on", eight, "nf4", 64, True, tokens),
        GpuCase("70B, NF4, rank 64, checkpointing on", seventy, "nf4", 64, True, tokens),
    ]


def run_gpu(case: GpuCase, device: str) -> dict[str, Any]:
    """Prediction and measurement of one case; without an NVIDIA GPU nothing is measured."""
    import torch

    from benchmarks.engine.gpu import llama

    shape_of = llama(*case.sizes)
    config = case.config()
    shape = read_shape(shape_of.to_dict(), case.name)
    setting = setting_of(resolve(config, Machine("cuda", "a GPU", 1, 2**37, bf16=True)), "cuda", example_tokens=case.tokens)
    predicted = estimate_memory(shape, count_parameters(shape, config), config, setting)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses = _steps(case, config, device)
    handed_out = predicted.total - predicted.parts["process"] - predicted.parts["reserve"]
    found = {"case": case.name, "predicted": predicted.total, "parts": predicted.parts, "losses": losses}
    if device == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        found |= {"measured": allocated, "error": handed_out / allocated - 1, "reserved": reserved}
        found |= {"error_reserved": (predicted.total - predicted.parts["process"]) / reserved - 1}
    return found


def _steps(case: GpuCase, config: Config, device: str) -> list[float]:
    """Losses of two steps, computed as a run computes them."""
    import torch

    from benchmarks.engine import gpu
    from finetune.config.schema import Lora
    from finetune.model.adapters import attach, trainable
    from finetune.model.fast import accelerate
    from finetune.model.head import target_losses
    from finetune.model.quantize import disable_cpu_repacking

    torch.manual_seed(0)
    assert isinstance(config.tuning, Lora)
    sizes = gpu.llama(*case.sizes)
    model = gpu.quantized(sizes, device) if case.base == "nf4" else _plain(sizes, device)
    disable_cpu_repacking(model)
    model = attach(model, config.tuning)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    accelerate(model, config.tuning)
    model.train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-4, fused=True)
    ids = torch.randint(10, sizes.vocab_size, (1, case.tokens))
    losses = []
    for _ in range(_STEPS):
        with torch.autocast(device, torch.bfloat16):
            loss = target_losses(model, ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def _plain(sizes: Any, device: str) -> Any:
    """A bf16 model, drawn on the device weight by weight."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from benchmarks.engine.gpu import drawn

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(drawn(tuple(parameter.shape), device), requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(sizes).to(device)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()
