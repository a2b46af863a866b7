"""A base of 21 shards and everything that can be wrong with a merge of it: the exit code, the reason, and nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.errors import FinetuneError, VerificationError
from finetune.merging.destination import clear_leftovers
from finetune.merging.fold import fold
from finetune.merging.merge import MergeOptions, merge, merge_measured
from finetune.merging.reference import probe_of, reference_of
from finetune.model.weights import INDEX, Weights
from tests.merging.conftest import write_llama
from tests.merging.test_merge import ROWS

FP32 = MergeOptions(dtype="fp32")
Make = Callable[..., Any]
UP = "model.layers.1.mlp.up_proj.weight"


def one_tensor_a_shard(base: Path) -> None:
    """Split a model into as many shards as it has tensors."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    placement = {name: f"model-{number:05d}-of-{len(tensors):05d}.safetensors" for number, name in enumerate(sorted(tensors), 1)}
    for name, file in placement.items():
        save_file({name: tensors[name]}, base / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    (base / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": placement}))


def shard_of(made: Any, name: str) -> Path:
    placement = json.loads((made.source.base_dir / INDEX).read_text())["weight_map"]
    path: Path = made.source.base_dir / placement[name]
    return path


def damaged_shard(made: Any) -> None:
    path = shard_of(made, UP)
    path.write_bytes(path.read_bytes()[:-100])


def missing_tensor(made: Any) -> None:
    shard_of(made, UP).unlink()
    index = made.source.base_dir / INDEX
    found = json.loads(index.read_text())
    del found["weight_map"][UP]
    index.write_text(json.dumps(found))


def edit_adapter(made: Any, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = made.source.adapter_dir / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def wrong_shape(made: Any) -> None:
    key = f"base_model.model.{UP.removesuffix('.weight')}.lora_B.weight"
    edit_adapter(made, lambda tensors: tensors.update({key: torch.ones(96, 4)}))


def unused_tensor(made: Any) -> None:
    key = "base_model.model.model.layers.7.mlp.up_proj"
    extra = {f"{key}.lora_A.weight": torch.ones(4, 64), f"{key}.lora_B.weight": torch.ones(128, 4)}
    edit_adapter(made, lambda tensors: tensors.update(extra))


def wrong_base(made: Any) -> None:
    path = shard_of(made, UP)
    tensors = load_file(path)
    save_file({UP: torch.randn(tensors[UP].shape, generator=torch.Generator().manual_seed(8)) * tensors[UP].std()}, path, {"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Any], None], str]] = {
    "damaged-shard": (damaged_shard, "damaged"),
    "missing-tensor": (missing_tensor, "lacks 1 tensors"),
    "wrong-shape": (wrong_shape, "shape"),
    "unused-tensor": (unused_tensor, "no such tensor"),
    "wrong-base": (wrong_base, "differs from the adapter model"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a4_b9_twenty_shards_with_one_fault_leave_nothing(make: Make, tmp_path: Path, kind: str) -> None:
    made = make()
    one_tensor_a_shard(made.source.base_dir)
    with Weights.of_model(made.source.base_dir) as weights:
        assert len(weights.files) >= 20
    damage, reason = DAMAGE[kind]
    damage(made)
    with pytest.raises(VerificationError, match=reason) as caught:
        merge(made.model, made.source, tmp_path / "merged", ROWS, FP32)
    assert caught.value.exit_code == 6
    assert all(problem.where for problem in caught.value.problems)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_twenty_shards_without_a_fault_are_merged(make: Make, tmp_path: Path) -> None:
    made = make()
    one_tensor_a_shard(made.source.base_dir)
    fold(made.source, tmp_path / "merged", torch.float32)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(made.tokens).logits
    assert (found - made.logits()).abs().max() < 1e-4
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) >= 20


# --- by the command line, in a process of its own -----------------------------------------------------------------------------------------


@pytest.fixture
def run(write_config: Any, train_here: Any) -> Path:
    path: Path = train_here(write_config())
    return path


def command(run: Path, merged: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "finetune", "merge", str(run), "-O", str(merged), "--dtype", "fp32", *more]


def test_c10_a_full_disk_is_a_reason_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """The kernel refuses to let any file of the process grow beyond 100 kB, as a full disk does."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    before = {path.name for path in tmp_path.iterdir()}
    done = subprocess.run(command(run, tmp_path / "merged"), capture_output=True, text=True, preexec_fn=limited, check=False)
    assert done.returncode == 4, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == before


def test_b2_a_killed_merge_is_cleared_away_by_the_next(run: Path, finetune: Any, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    process = subprocess.Popen(command(run, tmp_path / "merged"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob(".merged.*.tmp")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "merged").exists()
    done = finetune("merge", run, "-O", tmp_path / "merged", "--dtype", "fp32")
    assert done.code == 0, done.err
    assert {path.name for path in tmp_path.iterdir()} == before | {"merged"}


def test_b2_a_name_that_a_kill_took_away_is_given_back(tmp_path: Path) -> None:
    """Where a file system cannot exchange two names, a kill between two renames leaves the earlier merge under another one."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own, merged = os.getpid(), tmp_path / "merged"
    names = (f".merged.{dead.pid}.old", f".merged.{dead.pid}.tmp", f".merged.{own}.tmp", f".mergedx.{dead.pid}.tmp", ".merged.notes.tmp")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    clear_leftovers(merged)
    assert (merged / "a").read_text() == names[0]
    assert {path.name for path in tmp_path.iterdir()} == {"merged", *names[2:]}
    (tmp_path / names[0]).mkdir()
    clear_leftovers(merged)
    assert not (tmp_path / names[0]).exists()
    assert (merged / "a").read_text() == names[0]


@pytest.mark.usefixtures("measured_here")
def test_a_reference_can_be_merged_when_its_model_is_gone(make: Make, tmp_path: Path) -> None:
    made = make(tied=True)
    reference = reference_of(made.model, made.source, probe_of(ROWS))
    source = replace(made.source)
    del made
    report = merge_measured(reference, source, tmp_path / "merged", FP32)
    assert report.parity.max_logit_difference < 1e-4
    other = write_llama(tmp_path / "other", tied=True, dtype=torch.float32)
    (other / "model.safetensors").write_bytes((tmp_path / "merged" / "model.safetensors").read_bytes())
    with pytest.raises(FinetuneError):
        merge_measured(reference, replace(source, base_dir=other), tmp_path / "again", FP32)
