"""What is said of the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import table

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
_DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"


def _run(tool: str, number: int, variant: str = "LoRA", **figures: float) -> dict[str, Any]:
    usual = {name: 100.0 for _, name, _ in table._COLUMNS} | {"others_load": 0.0, "validation_loss": 2.0}
    return {"tool": tool, "round": number, "variant": variant} | usual | figures


def _quarter(rates: dict[str, Any]) -> dict[str, Any]:
    return {part: {"median": value["median"] / 4} for part, value in rates.items()}


def _results(*runs: dict[str, Any]) -> dict[str, Any]:
    rates = {part: {"median": 1e4} for part in ("layers", "head", "layers_cpu", "head_cpu")}
    return {
        "machine": {"processor": "one", "cores": 2, "memory_gib": 8.0, "bf16": True},
        "versions": {"torch": "2.13.0"},
        "model": {"name": "small"} | dict.fromkeys(_SIZES, 8),
        "data": {
            name: {"train": dict.fromkeys(("rows", "tokens", "supervised_tokens", "squared_tokens", "shortest", "median", "longest"), 10)}
            for name in (table.LORA, table.LORA_FP32, table.NF4)
        },
        "runs": list(runs),
        "limits": [
            {"round": 0, "variant": variant, "when": when, "bf16": rates, "fp32": _quarter(rates)}
            for variant in (table.LORA, table.LORA_FP32)
            for when in ("before", "after")
        ],
        "candidates": [],
    }


def _verdicts(*runs: dict[str, Any]) -> dict[str, str]:
    return {floor.promise: floor.verdict for floor in table.floors(_results(*runs))}


def test_a_ratio_is_to_the_fastest_peer_of_its_own_round() -> None:
    runs = [
        _run("finetune", 0, tokens_per_s=300.0),
        _run("TRL", 0, tokens_per_s=100.0),
        _run("transformers+PEFT", 0, tokens_per_s=150.0),
        _run("finetune", 1, tokens_per_s=100.0),
        _run("TRL", 1, tokens_per_s=50.0),
        _run("finetune", 2, tokens_per_s=100.0),
        _run("TRL", 2, "NF4", tokens_per_s=1.0),
    ]
    assert table.ratios(runs, "LoRA", "tokens_per_s") == [2.0, 2.0]


def test_what_was_not_measured_is_called_so() -> None:
    assert set(_verdicts().values()) == {"not measured"}
    assert set(_verdicts(_run("finetune", 0)).values()) == {"not measured", "holds"}  # the limit needs no peer


@pytest.mark.parametrize(("speed", "verdict"), [(2.0, "holds"), (1.99, "does not hold")])
def test_the_floor_of_speed(speed: float, verdict: str) -> None:
    found = _verdicts(_run("finetune", 0, tokens_per_s=speed), _run("TRL", 0, tokens_per_s=1.0))
    assert found["LoRA, whole command: at least 2x the fastest peer"] == verdict


@pytest.mark.parametrize(("loss", "verdict"), [(1.5, "holds"), (2.0099, "holds"), (2.02, "does not hold")])
def test_the_floor_of_loss_compares_with_the_lowest_peer(loss: float, verdict: str) -> None:
    found = _verdicts(_run("finetune", 0, validation_loss=loss), _run("TRL", 0), _run("transformers+PEFT", 0, validation_loss=3.0))
    assert found["LoRA: validation loss at most 0.01 nats above the lowest peer's"] == verdict


@pytest.mark.parametrize(("peak", "verdict"), [(100.0, "holds"), (101.0, "does not hold")])
def test_the_floor_of_memory_compares_with_the_leanest_peer(peak: float, verdict: str) -> None:
    found = _verdicts(_run("finetune", 0, peak_mib=peak), _run("TRL", 0), _run("transformers+PEFT", 0, peak_mib=900.0))
    assert found["LoRA: peak memory not above the leanest peer's"] == verdict


def test_the_floor_of_the_limit_holds_where_either_type_reaches_it_and_both_are_told() -> None:
    """Each type has its own limit, the mean of what was measured before and after the run."""
    whole = _results(_run("finetune", 0, steady_tokens_per_s=1.0))
    bf16 = 1 / table.fractions(whole, table.LORA)[0]  # tokens a second that are all of the limit
    whole["limits"][1]["bf16"] = _quarter(_quarter(_quarter(whole["limits"][1]["bf16"])))
    assert table.fractions(whole, table.LORA)[0] * bf16 == pytest.approx(2 / (1 + 1 / 64))
    for of_bf16, of_fp32, verdict in ((0.5, 0.7, "holds"), (0.6001, 0.1, "holds"), (0.5, 0.59, "does not hold")):
        runs = (
            _run("finetune", 0, steady_tokens_per_s=of_bf16 * bf16),
            _run("finetune", 0, table.LORA_FP32, steady_tokens_per_s=of_fp32 * bf16 / 4),
        )
        floor = table.floors(_results(*runs))[-1]
        assert (floor.measured, floor.verdict) == (f"bf16 {of_bf16:.2f}, fp32 {of_fp32:.2f}", verdict)


def test_a_failed_tool_and_a_busy_machine_are_told() -> None:
    failed = {"tool": "TRL", "round": 0, "variant": "LoRA", "failed": "exit code 1"}
    page = table.markdown(_results(_run("finetune", 0, others_load=0.5), failed))
    assert "TRL failed in round 1: exit code 1" in page
    assert "Other processes used up to 50% of the cores" in page


def test_settings_that_were_tried_are_listed_failures_too() -> None:
    tried = [
        _run("TRL", 0) | {"setting": "small", "rows": 48, "last_loss": 1.5},
        {"tool": "TRL", "setting": "large", "failed": "no memory"},
    ]
    page = table.markdown(_results() | {"candidates": tried})
    assert "| TRL | small | 48 | 100 | 100 | 100 | 1.5000 |" in page
    assert "| TRL | large | failed: no memory | | | | |" in page


def test_what_no_gpu_measured_is_called_so() -> None:
    assert "Not measured: `make bench-gpu` needs a GPU" in table.markdown(_results())
    seventy = {"tokens": 4096, "peak_allocated": 2**35, "peak_reserved": 2**36}
    eight = [_run("finetune", 0, steady_tokens_per_s=900.0), {"tool": "TRL", "variant": "NF4", "round": 0, "failed": "no memory"}]
    page = table.markdown(_results() | {"gpu": {"device": "some", "torch": "2.13.0", "70b": seventy, "8b": eight}})
    for part in ("peak 32.0 GiB, 64.0 reserved", "900 steady", "TRL, round 1: failed: no memory"):
        assert part in page


def test_the_page_is_that_of_the_results() -> None:
    """Written by the same run: neither is edited by hand."""
    if not (_DOCS / "engine.json").is_file():
        pytest.skip("not measured yet")
    assert (_DOCS / "engine.md").read_text() == table.markdown(json.loads((_DOCS / "engine.json").read_text()))
