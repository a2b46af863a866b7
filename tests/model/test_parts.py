"""Files of our own adapter format that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import VerificationError
from finetune.model.adapters import WEIGHTS, load, name_base, save, trainable
from finetune.model.parts import CONFIG
from tests.model.method_cases import Llama, attached, base, train

DAMAGED = {
    "not JSON": "{",
    "not an object": "[]",
    "of no format": {"format": None},
    "of a format to come": {"format": "finetune-adapter-2"},
    "of another method": {"method": "lora"},
    "with a field of its own": {"width": 3},
    "without a method": {"method": None},
}


@pytest.fixture
def saved(llama: Llama, tmp_path: Path) -> Path:
    model = train(attached(llama, "houlsby"))
    name_base(model, "owner/base")
    save(model, tmp_path)
    return tmp_path


def test_the_files_say_what_they_are(saved: Path) -> None:
    written = json.loads((saved / CONFIG).read_text())
    assert written == {
        "format": "finetune-adapter-1",
        "method": "houlsby",
        "bottleneck": 8,
        "placement": "both",
        "activation": "gelu",
        "base_model_name_or_path": "owner/base",
    }
    assert "model.layers.0.self_attn.houlsby.down.weight" in load_file(saved / WEIGHTS)


@pytest.mark.parametrize("damage", DAMAGED)
def test_c1_a_damaged_configuration_is_refused(saved: Path, llama: Llama, damage: str) -> None:
    change: Any = DAMAGED[damage]
    written = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(change if isinstance(change, str) else json.dumps(written | change))
    with pytest.raises(VerificationError, match="cannot read the adapter's configuration"):
        load(base(llama), saved)


def test_a4_a_tensor_of_another_shape_is_refused(saved: Path, llama: Llama) -> None:
    tensors = load_file(saved / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.zeros(3)}, saved / WEIGHTS)
    with pytest.raises(VerificationError, match="shape"):
        load(base(llama), saved)


def test_an_adapter_goes_on_training_where_asked(saved: Path, llama: Llama) -> None:
    model = load(base(llama), saved, is_trainable=True)
    assert len(trainable(model)) == 2 * 2 * 4
    assert not trainable(load(base(llama), saved))
