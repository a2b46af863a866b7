"""Operations, time and energy of a run."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.config.schema import Config
from finetune.planning.gpus import gpu_of
from finetune.planning.lookup import find_shape
from finetune.planning.memory import Setting
from finetune.planning.parameters import count_parameters
from finetune.planning.throughput import cost_of, estimated_speed, measured_speed, operations_per_token, stated_speed


def operations(model: str, rank: int, *, checkpointing: bool, tuning: dict[str, Any] | None = None) -> float:
    config = Config.model_validate(
        {
            "model": {"id": model},
            "tuning": tuning or {"method": "lora", "rank": rank, "alpha": rank},
            "data": {"train": [{"source": "rows.jsonl"}]},
            "output": "out",
        }
    )
    where = Setting("cuda", "bf16", "bf16", 4096, checkpointing, "adamw", example_tokens=4096)
    shape = find_shape(config.model)
    return operations_per_token(shape, count_parameters(shape, config), config, where, supervised_share=0.4)


@pytest.mark.parametrize(
    ("model", "rank", "checkpointing", "giga"),
    [
        ("meta-llama/Meta-Llama-3-8B", 16, False, 32.8),
        ("meta-llama/Meta-Llama-3-8B", 16, True, 47.8),
        ("meta-llama/Meta-Llama-3-70B", 64, True, 442),
    ],
)
def test_operations_are_those_of_a_hand_calculation(model: str, rank: int, checkpointing: bool, giga: float) -> None:
    """4,096 tokens, 40 % supervised: counted product by product for the performance leads, before this code was there."""
    assert operations(model, rank, checkpointing=checkpointing) / 1e9 == pytest.approx(giga, rel=0.02)


def test_full_tuning_adds_the_gradients_of_weights() -> None:
    """Six operations a weight and token (2001.08361), and attention."""
    shape = find_shape(
        Config.model_validate(
            {
                "model": {"id": "meta-llama/Llama-3.2-1B"},
                "tuning": {"method": "full"},
                "data": {"train": [{"source": "a.jsonl"}]},
                "output": "o",
            }
        ).model
    )
    found = operations("meta-llama/Llama-3.2-1B", 0, checkpointing=False, tuning={"method": "full"})
    attention = 6 * shape.layers * shape.heads * shape.head_dim * 4096
    assert found - attention == pytest.approx(6 * shape.blocks_scalars + (2 + 4 * 0.4) * shape.embedding_scalars, rel=0.001)


def test_an_estimate_says_so_and_scales_with_devices() -> None:
    gpu = gpu_of("H100")
    one, four = (estimated_speed(30e9, gpu, devices) for devices in (1, 4))
    assert one.tokens_per_second == pytest.approx(989e12 * 0.4 / 30e9)
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)
    assert one.origin == "estimated"
    assert "40%" in one.reason
    assert "H100" in one.reason


def test_a_measured_speed_is_the_median_step_without_the_first() -> None:
    rows = [{"kind": "step", "step": 1, "tokens": 100, "seconds": 50.0}, {"kind": "evaluation", "step": 1, "seconds": 3.0}]
    rows += [{"kind": "step", "step": step, "tokens": 100, "seconds": seconds} for step, seconds in ((2, 1.0), (3, 2.0), (4, 4.0))]
    speed = measured_speed(rows, "runs/mine")
    assert speed is not None
    assert (speed.tokens_per_second, speed.origin) == (50.0, "measured")
    assert "runs/mine" in speed.reason
    assert measured_speed(rows[:4], "runs/mine") is None


def test_time_and_energy() -> None:
    cost = cost_of(3_600_000, stated_speed(1000), watts=700 * 8)
    assert cost.seconds == 3600
    assert cost.kilowatt_hours == pytest.approx(5.6)
    assert cost_of(1000, stated_speed(10)).kilowatt_hours is None
