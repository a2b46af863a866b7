"""A model that does not fit in memory is measured weight by weight, with the same figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.errors import VerificationError
from finetune.merging import streamed, verify
from finetune.merging.fold import fold
from finetune.merging.reload import Probe, measure
from finetune.merging.streamed import is_too_large, measure_streamed
from finetune.merging.verify import measure_in_fresh_process
from finetune.model.weights import Weights

Make = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    ids: list[int]
    mask: list[bool]


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(4)
    lengths = (9, 30, 4, 1, 17, 22)
    found = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]
    return [Row(ids, [place % 3 != 1 and index != 2 for place in range(len(ids))]) for index, ids in enumerate(found)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tokens", [streamed.TOKENS_A_PASS, 40], ids=["one-pass", "several-passes"])
def test_streamed_figures_are_those_of_the_loaded_model(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, tokens: int
) -> None:
    monkeypatch.setattr(streamed, "TOKENS_A_PASS", tokens)
    fold(make(tied=tied, shards=True).source, tmp_path / "merged", torch.float32)
    probe = Probe.of(rows(), positions=20)
    expected = measure(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), probe, "cpu")
    found = measure_streamed(tmp_path / "merged", probe, "cpu")
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


def test_no_two_weights_are_held_at_once(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold(make(tied=True).source, tmp_path / "merged", torch.float32)
    models: list[Any] = []
    build, held = streamed._without_weights, []

    def watched(*arguments: Any) -> Any:
        models.append(build(*arguments))
        return models[0]

    def counting(self: Weights, name: str) -> torch.Tensor:
        held.append(sum(parameter.numel() for parameter in models[0].parameters() if parameter.device.type != "meta"))
        return read(self, name)

    read = Weights.read
    monkeypatch.setattr(streamed, "_without_weights", watched)
    monkeypatch.setattr(Weights, "read", counting)
    measure_streamed(tmp_path / "merged", Probe.of(rows()), "cpu")
    assert len(held) == 21
    assert max(held) == 0


def test_the_fresh_process_streams_what_does_not_fit(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold(make().source, tmp_path / "merged", torch.float32)
    assert not is_too_large(tmp_path / "merged", "cpu")
    monkeypatch.setattr(streamed, "_free", lambda _device: 1 << 29)
    assert is_too_large(tmp_path / "merged", "cpu")
    used: list[str] = []
    measured_by = verify.measured_by
    monkeypatch.setattr(verify, "measured_by", lambda module, *rest: used.append(module) or measured_by(module, *rest))
    probe = Probe.of(rows())
    found = measure_in_fresh_process(tmp_path / "merged", probe)
    assert used == ["finetune.merging.streamed"]
    expected = measure(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), probe, "cpu")
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)


@pytest.mark.parametrize("change", ["missing", "left-over"])
def test_a4_a_streamed_directory_must_hold_the_models_tensors(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    fold(make().source, tmp_path / "merged", torch.float32)
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(2)
    save_file(tensors, path, {"format": "pt"})
    monkeypatch.setattr(streamed, "_free", lambda _device: 0)
    with pytest.raises(VerificationError, match="does not reload") as caught:
        measure_in_fresh_process(tmp_path / "merged", Probe.of(rows()))
    assert "up_proj" in str(caught.value)
