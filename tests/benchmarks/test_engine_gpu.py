"""The GPU part, as far as a machine without one can tell."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.engine import gpu


@pytest.mark.parametrize(("shape", "scalars"), [(gpu.LLAMA_8B, 8_030_261_248), (gpu.LLAMA_70B, 70_553_706_496)])
def test_the_shapes_are_those_of_llama_3(shape: tuple[int, ...], scalars: int) -> None:
    assert sum(math.prod(size) for sizes in gpu.tensors(gpu.llama(*shape)) for size in sizes.values()) == scalars


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 4
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_the_70b_part_computes_on_small_shapes() -> None:
    found = gpu.seventy(gpu.tiny())
    config = gpu.tiny().seventy
    with torch.device("meta"):
        expected = gpu.AutoModelForCausalLM.from_config(config).num_parameters()
    assert found["scalars"] == expected
    assert found["losses"][0] == pytest.approx(math.log(config.vocab_size), abs=0.5)  # random weights know nothing
    assert found["losses"][1] < found["losses"][0]


def test_random_weights_load_as_a_model(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    config = gpu.llama(16, 32, 2, 2, 1, 50)
    model, told = gpu.AutoModelForCausalLM.from_pretrained(
        gpu.write_random(config, tmp_path / "model", tmp_path, "cpu"), output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
