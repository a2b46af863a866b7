"""The probe of a micro-batch's size, on a device that is an equation."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import HardwareError
from finetune.training.probe import MOST, Pass, affordable, find_budget


class Device:
    """Holds ``fixed`` + ``slope`` x tokens bytes of a pass; from ``bend`` tokens on each takes four times as much."""

    def __init__(self, free: int, fixed: int = 1_000, slope: int = 10, bend: int = 10**9) -> None:
        self.free, self.fixed, self.slope, self.bend = free, fixed, slope, bend
        self.asked: list[int] = []

    def __call__(self, tokens: int) -> Pass:
        self.asked.append(tokens)
        wanted = self.fixed + self.slope * (tokens + 3 * max(0, tokens - self.bend))
        if wanted > self.free:
            raise torch.OutOfMemoryError("full")
        return Pass(tokens, wanted)


def test_finds_the_most_that_fits_within_nine_tenths_of_what_is_free():
    device = Device(free=101_000)
    choice = find_budget(device, device.free, longest=512)
    assert choice.value == (90_900 - 1_000) // 10
    assert device.asked == [512, 1024, choice.value]  # and it has been run


def test_more_than_is_useful_is_not_taken():
    device = Device(free=10**9)
    assert find_budget(device, device.free, longest=512).value == MOST


def test_backs_off_once_where_the_line_promised_too_much():
    device = Device(free=101_000, bend=6_000)
    choice = find_budget(device, device.free, longest=512)
    assert device.asked == [512, 1024, 8_990, 4_495]
    assert choice.value == 4_495
    assert "half of 8990" in choice.reason


def test_a_second_failure_is_an_error_with_the_override():
    device = Device(free=101_000, bend=2_000)
    with pytest.raises(HardwareError, match="8990 and of 4495 tokens") as caught:
        find_budget(device, device.free, longest=512)
    assert caught.value.exit_code == 4
    assert "train.tokens_per_device=1024, which fitted" in (caught.value.problems[0].fix or "")  # as the second pass has shown
    assert len(device.asked) == 4


def test_one_example_that_does_not_fit_is_an_error_at_once():
    device = Device(free=2_000)
    with pytest.raises(HardwareError, match="one example of 512 tokens"):
        find_budget(device, device.free, longest=512)
    assert device.asked == [512]


def test_where_two_do_not_fit_one_is_the_budget():
    device = Device(free=7_000)
    assert find_budget(device, device.free, longest=512).value == 512


def test_a_pass_whose_memory_does_not_grow_sets_no_limit():
    assert affordable(Pass(10, 500), Pass(20, 500), 1_000) == MOST
    assert affordable(Pass(10, 500), Pass(20, 600), 400) == 10
