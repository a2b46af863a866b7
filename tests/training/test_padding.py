"""The padding that is expected is that of the micro-batches that training cuts."""

from __future__ import annotations

import pytest

from finetune.config.schema import Config
from finetune.training.padding import padding_share


def config(batch_size: int) -> Config:
    return Config.model_validate(
        {
            "model": {"id": "owner/name"},
            "tuning": {"method": "lora"},
            "data": {"train": ({"source": "/a.jsonl"},)},
            "train": {"batch_size": batch_size},
            "output": "out",
        }
    )


def test_equal_lengths_need_no_padding() -> None:
    assert padding_share([8] * 10, config(4), 64) == 0.0


def test_one_micro_batch_is_padded_to_its_longest() -> None:
    assert padding_share([10, 5, 5], config(3), 64) == pytest.approx(10 / 30)


def test_a_smaller_budget_pads_less() -> None:
    lengths = [1 + 7 * number % 50 for number in range(100)]
    assert padding_share(lengths, config(16), 64) < padding_share(lengths, config(16), 1024) < 0.6
