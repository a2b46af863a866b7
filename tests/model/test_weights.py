"""Reading safetensors directories: what is found, and what is refused."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import VerificationError
from finetune.model.shards import ShardWriter, Slot
from finetune.model.weights import INDEX, SINGLE, TensorInfo, Weights


def write(directory: Path, files: dict[str, dict[str, torch.Tensor]], index: object = None) -> Path:
    for file, tensors in files.items():
        save_file(tensors, directory / file, {"format": "pt"})
    if index is not None:
        (directory / INDEX).write_text(json.dumps(index))
    return directory


def test_tensors_are_listed_and_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    with Weights.of_model(write(tmp_path, {SINGLE: tensors})) as weights:
        assert weights.info["a"] == TensorInfo(SINGLE, (2, 3), torch.float32)
        assert torch.equal(weights.read("a"), tensors["a"])
        assert weights.metadata == {"format": "pt"}
        with pytest.raises(VerificationError, match="no tensor c"):
            weights.read("c")


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("[", "damaged"),
        ({"weight_map": []}, "damaged"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "no safetensors file beside"),
        ({"weight_map": {"a": "one.bin"}}, "no safetensors file beside"),
        ({"weight_map": {"a": "three.safetensors"}}, "missing or damaged"),
        ({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}}, "c first"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index: object, reason: str) -> None:
    write(tmp_path, {"one.safetensors": {"a": torch.ones(2)}}, index)
    if isinstance(index, str):
        (tmp_path / INDEX).write_text(index)
    with pytest.raises(VerificationError, match=reason):
        Weights.of_model(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    one = {"a": torch.ones(2)}
    write(tmp_path, {"one.safetensors": one, "two.safetensors": {**one, "b": torch.ones(2)}})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(VerificationError, match=r"is in one\.safetensors too"):
        Weights.of_model(tmp_path)


def test_types_that_nothing_here_computes_with_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {SINGLE: {"a": torch.ones(2).to(torch.float8_e4m3fn)}})
    with pytest.raises(VerificationError, match="not supported"):
        Weights.of_model(tmp_path)


def test_c1_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(VerificationError, match=r"only pickled weights \(pytorch_model.bin\)"):
        Weights.of_model(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(VerificationError, match="no weights"):
        Weights.of_model(tmp_path)


def test_a_shard_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5).bfloat16().T,
        "odd": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }
    slots = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with ShardWriter(tmp_path / SINGLE, slots) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    with Weights.of_model(tmp_path) as weights:
        assert set(weights.info) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(weights.read(name), tensor)
            assert weights.info[name].dtype == tensor.dtype


def test_a_shard_takes_only_what_was_announced(tmp_path: Path) -> None:
    slots = {"a": Slot((2,), torch.float32), "b": Slot((2,), torch.float32)}
    for case, tensor in enumerate((torch.ones(3), torch.ones(2, dtype=torch.float16))):
        with pytest.raises(VerificationError, match="was due"), ShardWriter(tmp_path / f"{case}", slots) as writer:
            writer.write("a", tensor)
    with pytest.raises(VerificationError, match="was due"), ShardWriter(tmp_path / "order", slots) as writer:
        writer.write("b", torch.ones(2))
    with pytest.raises(VerificationError, match="1 tensors were never written"), ShardWriter(tmp_path / "short", slots) as writer:
        writer.write("a", torch.ones(2))


def test_b7_a_shard_notices_that_the_disk_took_all_but_its_last_bytes(tmp_path: Path) -> None:
    """They are fewer than what C's own files keep back, and lose without a word."""
    tensor = torch.ones((1 << 20) + 100, dtype=torch.uint8)

    def write_shard(path: Path) -> None:
        with ShardWriter(path, {"a": Slot(tuple(tensor.shape), tensor.dtype)}) as writer:
            writer.write("a", tensor)

    write_shard(tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "whole").stat().st_size - 50, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_shard(tmp_path / "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
