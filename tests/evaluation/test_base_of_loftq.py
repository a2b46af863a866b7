"""A run that LoftQ started: what its base is, and whom its adapter is for, is said where it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import api
from finetune.evaluation.results import LOFTQ_BASE
from finetune.reporting.html import write_report
from finetune.runs import open_run


def loftq(iterations: int) -> dict[str, object]:
    return {
        "quantization": {"method": "nf4"},
        "tuning": {"method": "lora", "rank": 4, "init": {"method": "loftq", "iterations": iterations}},
        "train": {"epochs": 1, "max_steps": 2, "batch_size": 8, "precision": "fp32", "tokens_per_device": 256},
    }


def test_the_base_of_a_loftq_run_is_named_in_its_results(
    write_config: Callable[..., Path], train_here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.cli.view import show_results

    run = train_here(write_config(**loftq(2)))
    results = api.evaluate(run)
    assert results.notes == (LOFTQ_BASE,)
    assert api.stored_results(run) == results
    show_results(results)
    assert LOFTQ_BASE in " ".join(capsys.readouterr().out.split())
    assert "base: the model before its first step" in write_report([open_run(run)]).read_text()


def test_other_runs_have_no_note(write_config: Callable[..., Path], train_here: Callable[..., Path]) -> None:
    run = train_here(write_config(train={"epochs": 1, "max_steps": 2, "batch_size": 8, "precision": "fp32", "tokens_per_device": 256}))
    assert api.evaluate(run).notes == ()
    card = (run / "adapter" / "README.md").read_text()
    assert "LoftQ" not in card


@pytest.mark.parametrize(("iterations", "said"), [(1, "PEFT loads it as it is"), (2, "**Not for PEFT alone.**")])
def test_the_card_of_a_loftq_adapter_says_whom_it_is_for(
    write_config: Callable[..., Path], train_here: Callable[..., Path], iterations: int, said: str
) -> None:
    card = (train_here(write_config(**loftq(iterations))) / "adapter" / "README.md").read_text()
    assert said in card
    assert ("restore_base" in card) == (iterations > 1)
    assert ("`finetune merge`" in card) == (iterations > 1)
