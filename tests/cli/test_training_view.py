"""The head of a training run: lines that wrap well, figures that can be read, groups by name."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from finetune.cli import view
from finetune.cli.training_view import TrainingView, group_names, share
from finetune.config.load import load_config
from finetune.planning.steps import Steps
from finetune.training.metrics import Started

GROUP = {"name": "(rest)", "tensors": 3, "parameters": 300, "learning_rate": 1e-3, "weight_decay": 0.0}
LOFTQ = "LoftQ, relative quantization error: " + ", ".join(f"{kind}_proj 0.083 -> 0.067" for kind in ("q", "k", "v", "o", "gate"))


def shown(config: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    stream = io.StringIO()
    monkeypatch.setattr(view, "err", Console(file=stream, width=80, force_terminal=True, no_color=True, color_system=None))
    watching = TrainingView(load_config(config).config)
    with watching.running():
        watching(
            Started(
                steps=Steps(9, 9, 0),
                done=0,
                trainable=2,
                total=1_000_000,
                groups=(GROUP,),
                counts={"training rows": 72, "training tokens": 1000},
                choices={"precision": ("fp32", "the processor has no fast bf16 matrix products, which makes fp32 the quicker one here")},
                notes=(LOFTQ,),
                device="1 x cpu, base nf4",
                device_bytes=2**34,
            )
        )
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_the_head_wraps_between_words_and_pairs(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(write_config(train={"epochs": 1, "max_steps": 12}), monkeypatch)
    head = lines[: next(number for number, line in enumerate(lines) if line.startswith("parameter group"))]
    assert all(len(line) <= 80 for line in head), head
    assert head[0].startswith("Training 2 of 1,000,000 parameters (0.0002%) on 1 x cpu")
    assert head[1].startswith("  ")
    assert not any(line.endswith(("_proj", "->", "0.083")) for line in head), head
    assert "`train.epochs: 1` ends before `train.max_steps: 12`" in " ".join(line.strip() for line in head)


def test_nothing_is_said_of_steps_that_are_taken(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "max_steps" not in "\n".join(shown(write_config(train={"max_steps": 9}), monkeypatch))


@pytest.mark.parametrize(("part", "whole", "said"), [(1, 8, "12.50%"), (1, 1_000_000, "0.0001%"), (5, 10_000, "0.05%"), (3, 3, "100.00%")])
def test_a_small_share_keeps_its_digits(part: int, whole: int, said: str) -> None:
    assert share(part, whole) == said


@pytest.mark.parametrize(
    ("names", "method", "said"),
    [
        (["(rest)"], "adamw", ["all"]),
        (["(rest)", "(rest), no decay"], "adamw", ["all", "all, no decay"]),
        (["mlp", "(rest)"], "adamw", ["mlp", "(rest)"]),
        (["(rest)", "(rest), no decay, AdamW"], "muon", ["all, muon", "all, no decay, AdamW"]),
    ],
)
def test_groups_are_named_for_people(names: list[str], method: str, said: list[str]) -> None:
    assert group_names([{"name": name} for name in names], method) == said
