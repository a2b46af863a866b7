"""Base models that do not load: one sentence and an exit code instead of a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.config.schema import EightBit, FourBit, NoQuantization, Quantization
from finetune.errors import ConfigError, VerificationError
from finetune.model.load import load_base, require_vocabulary

PLAIN = NoQuantization()


@pytest.fixture
def base(llama: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama(), tmp_path / "base"))


def load(directory: Path, quantization: Quantization = PLAIN) -> Any:
    return load_base(directory, quantization, torch.float32, torch.device("cpu"))


def test_truncated_weights_are_named(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(VerificationError, match="damaged") as error:
        load(base)
    assert error.value.exit_code == 6
    assert error.value.problems[0].where == str(base)
    assert error.value.problems[0].fix


@pytest.mark.parametrize("changes", [{"intermediate_size": 96}, {"vocab_size": 120}])
@pytest.mark.parametrize("quantization", [PLAIN, FourBit(method="nf4"), EightBit(method="int8")], ids=["plain", "nf4", "int8"])
def test_a_config_of_other_shapes_is_refused(base: Path, quantization: Quantization, changes: dict[str, int]) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(VerificationError, match=r"wrong shape for \S+\.weight") as error:
        load(base, quantization)
    assert error.value.problems[0].fix


def test_a8_a_tokenizer_larger_than_the_embedding_is_refused(base: Path) -> None:
    model = load(base)

    class Tokens(SimpleNamespace):
        def __len__(self) -> int:
            return int(self.count)

    require_vocabulary(Tokens(count=97), model)
    with pytest.raises(ConfigError, match="98 tokens, the model embeds only 97"):
        require_vocabulary(Tokens(count=98), model)
