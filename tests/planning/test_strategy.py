"""Which strategy `auto` chooses, and what it says: from the size of the model, the number of devices and their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import Config
from finetune.errors import ConfigError
from finetune.hardware import Machine
from finetune.planning.resolve import resolve
from finetune.planning.strategy import Crowd, Weights, choose_strategy, read_weights

LLAMA_70B = Weights(matrices=68_451_041_280, others=2_102_665_216)
LLAMA_8B = Weights(matrices=6_979_321_856, others=1_050_939_392)


def config(**sections: Any) -> Config:
    base: dict[str, Any] = {"model": {"id": "x/y"}, "tuning": {"method": "lora"}, "data": {"train": [{"source": "a.jsonl"}]}, "output": "o"}
    return Config.model_validate(base | sections)


def gpu(gib: int) -> Machine:
    return Machine("cuda", "a GPU", 8, gib * 2**30, bf16=True)


NF4 = {"quantization": {"method": "nf4"}}


@pytest.mark.parametrize(
    ("sections", "weights", "gib", "chosen", "said"),
    [
        (NF4, LLAMA_8B, 24, "ddp", "5.3 GiB of weights a device fit in 60% of 24 GiB"),
        (NF4, LLAMA_70B, 80, "ddp", "36.8 GiB of weights a device fit"),
        (NF4, LLAMA_70B, 48, "fsdp", "36.8 GiB of weights a device are more than 60% of 48 GiB"),
        ({}, LLAMA_70B, 80, "fsdp", "131.4 GiB"),
        ({}, LLAMA_8B, 80, "ddp", "15.0 GiB"),
        ({"tuning": {"method": "full"}}, LLAMA_70B, 80, "ddp", "full tuning"),
        ({"quantization": {"method": "int8"}}, LLAMA_70B, 80, "ddp", "8-bit"),
        ({"distributed": {"strategy": "fsdp"}}, LLAMA_8B, 80, "fsdp", "stated"),
        ({"distributed": {"strategy": "ddp"}}, LLAMA_70B, 24, "ddp", "stated"),
    ],
)
def test_auto_spreads_what_does_not_fit(sections: dict[str, Any], weights: Weights, gib: int, chosen: str, said: str) -> None:
    strategy, why = choose_strategy(config(**sections), gpu(gib), 2, Crowd(weights, 8, 8))
    assert strategy == chosen, why
    assert said in why


def test_processes_on_a_cpu_share_its_memory() -> None:
    cpu = Machine("cpu", "a CPU", 64, 64 * 2**30, bf16=True)
    assert choose_strategy(config(), cpu, 2, Crowd(LLAMA_8B, 2, 2))[0] == "ddp"
    strategy, why = choose_strategy(config(), cpu, 2, Crowd(LLAMA_8B, 4, 4))
    assert strategy == "fsdp"
    assert "for 4 processes" in why
    assert choose_strategy(config(), cpu, 2, Crowd(LLAMA_8B, 4, 2))[0] == "ddp", "two on each of two machines"


def test_one_device_shares_nothing_whatever_is_stated() -> None:
    resolved = resolve(config(distributed={"strategy": "fsdp"}), gpu(24))
    assert (resolved.strategy.value, resolved.strategy.reason) == ("ddp", "one device: there is nothing to share")


def test_there_is_nothing_to_offload_from_on_a_cpu() -> None:
    cpu = Machine("cpu", "a CPU", 64, 64 * 2**30, bf16=True)
    offloading = config(distributed={"strategy": "fsdp", "offload": True})
    assert choose_strategy(offloading, cpu, 2, Crowd(LLAMA_8B))[0] == "ddp", "one process: the same file resumes anywhere"
    with pytest.raises(ConfigError, match="no GPU here"):
        choose_strategy(offloading, cpu, 2, Crowd(LLAMA_8B, 2, 2))
    assert choose_strategy(offloading, gpu(24), 2, Crowd(LLAMA_8B, 2, 2))[0] == "fsdp"


def test_weights_are_counted_as_they_are_loaded(tiny_model_dir: Path) -> None:
    """Against the parameters of the loaded model, and against what bitsandbytes makes of them."""
    import torch

    from finetune.config.schema import FourBit, NoQuantization
    from finetune.model.load import load_base

    counted = read_weights(tiny_model_dir)
    model = load_base(tiny_model_dir, NoQuantization(), torch.float32, torch.device("cpu"))
    assert counted.matrices + counted.others == sum(parameter.numel() for parameter in model.parameters())
    assert counted.bytes(config(), 4) == sum(parameter.numel() * 4 for parameter in model.parameters())
    quantized = load_base(tiny_model_dir, FourBit(method="nf4", double_quant=False), torch.float32, torch.device("cpu"))
    stored = sum(parameter.numel() * parameter.element_size() for parameter in quantized.parameters())
    scales = sum(4 * p.quant_state.absmax.numel() for p in quantized.parameters() if hasattr(p, "quant_state"))
    nf4 = config(quantization={"method": "nf4", "double_quant": False})
    assert counted.bytes(nf4, 4) == stored + scales
