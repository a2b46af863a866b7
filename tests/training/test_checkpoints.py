"""Checkpoints: what a snapshot holds, how it is written beside the training, and that every method resumes with every optimizer."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from finetune.config.load import load_config
from finetune.config.schema import AdaLora, Config
from finetune.data.prepare import PreparedData, prepare
from finetune.data.render import Renderer
from finetune.errors import ConfigError, DivergedError, HardwareError, RunInterruptedError, VerificationError
from finetune.hardware import detect
from finetune.model.adalora import plan_ranks
from finetune.model.adapters import trainable
from finetune.planning.groups import assign_groups
from finetune.planning.resolve import resolve
from finetune.planning.steps import count_steps
from finetune.runs import RunDirectory
from finetune.scoring import Scorer
from finetune.sealed import verify
from finetune.training.build import Materials, build_model
from finetune.training.checkpoints import (
    Progress,
    Snapshot,
    checkpoint_bytes,
    load_checkpoint,
    optimizer_state,
    rotate,
    take_snapshot,
    write_checkpoint,
)
from finetune.training.loop import fit
from finetune.training.optimizer import build_optimizer
from finetune.training.session import Session
from finetune.training.signals import StopRequest
from finetune.training.writer import CheckpointWriter
from tests.methods import FIXED

CPU, ALONE = torch.device("cpu"), SimpleNamespace(process_index=0, num_processes=1)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "dropout": 0.2},
    "lora, dora": {"method": "lora", "rank": 4, "dora": True, "dropout": 0.2},
    "lora, whole embeddings": {"method": "lora", "rank": 4, "embeddings": "full"},
    "tied-lora": {"rank": 4, "dropout": 0.2},
    "adalora": {"rank": 2, "init_rank": 4, "every_steps": 1, "dropout": 0.2},
    "vera": {"rank": 16, "dropout": 0.2},
    **FIXED,
    "full, spectrum": {"method": "full", "targets": {"spectrum": 0.5}},
}
OPTIMIZERS = (
    "adamw",
    "adamw-8bit",
    "paged-adamw-8bit",
    "paged-adamw-32bit",
    "adafactor",
    "lion",
    "lion-8bit",
    "muon",
    "galore",
)
STOP_AT = 2  # of five steps, three an epoch


@pytest.fixture(scope="module")
def biased_model_dir(make_tiny_model: Callable[..., Path]) -> Path:
    """A model with biases, which BitFit trains."""
    return make_tiny_model(attention_bias=True)


@pytest.fixture(scope="module")
def make_config(tmp_path_factory: pytest.TempPathFactory, biased_model_dir: Path, chat_file: Path) -> Callable[[str, str], Config]:
    folder = tmp_path_factory.mktemp("configs")

    def make(method: str, optimizer: str) -> Config:
        galore = {"galore": {"rank": 8, "every_steps": 3}} if optimizer == "galore" else {}
        path = folder / "run.yaml"
        settings = {
            "model": {"id": str(biased_model_dir)},
            "tuning": {"method": method} | METHODS[method],
            "optimizer": {"method": optimizer, "learning_rate": 0.01} | galore,
            "data": {"train": [{"source": str(chat_file)}], "max_tokens": 256},
            "train": {"epochs": 2, "max_steps": 5, "batch_size": 8, "precision": "fp32", "tokens_per_device": 128, "kernels": "plain"},
            "output": str(folder / "run"),
        }
        path.write_text(json.dumps(settings))
        return load_config(path, ()).config

    return make


@pytest.fixture(scope="module")
def data(make_config: Callable[[str, str], Config], biased_model_dir: Path) -> PreparedData:
    return prepare(make_config("lora", "adamw").data, Renderer(AutoTokenizer.from_pretrained(biased_model_dir)), 0)


def make_session(config: Config, data: PreparedData, save: Callable[[Progress], None] = lambda _: None) -> Session:
    torch.manual_seed(config.seed)
    model = build_model(config, Materials(Path(config.model.id), resolve(config, detect()), (), data.train), CPU).model
    steps = count_steps(config, len(data.train))
    if isinstance(config.tuning, AdaLora):
        plan_ranks(model, config.tuning, steps.total)
    parameters = trainable(model)
    groups = assign_groups(parameters, config.optimizer)
    optimizer = build_optimizer(parameters, groups, config.optimizer)
    return Session(config, steps, data, Scorer(model, CPU, "fp32", 128), optimizer, groups, ALONE, lambda _: None, save)


def everything(session: Session) -> dict[str, torch.Tensor]:
    """Weights and optimizer states."""
    tensors, scalars = optimizer_state(session.optimizer, session.parameters)
    numbers = {f"{name}/{key}": torch.tensor(float(value)) for name, state in scalars.items() for key, value in state.items()}
    return {name: parameter.detach().clone() for name, parameter in session.parameters.items()} | tensors | numbers


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a2_every_method_resumes_bitwise_with_every_optimizer(
    make_config: Callable[[str, str], Config], data: PreparedData, tmp_path: Path, method: str, optimizer: str
) -> None:
    try:
        config = make_config(method, optimizer)
    except ConfigError:
        assert optimizer in ("galore", "muon")
        pytest.skip("the configuration is refused")
    run, saved = RunDirectory(tmp_path), []

    def save_in_the_middle(progress: Progress) -> None:
        saved.append(write_checkpoint(run, take_snapshot(tmp_path, "id", straight.scorer.model, straight.optimizer, progress)))

    straight = make_session(config, data)
    straight.save = save_in_the_middle
    stop = StopRequest()
    straight.record = lambda row: stop.__setattr__("signal_number", 15 if row.step == STOP_AT else None)
    with pytest.raises(RunInterruptedError):
        fit(straight, Progress(), stop)
    straight.save, straight.record, stop.signal_number = lambda _: None, lambda _: None, None
    fit(straight, Progress(step=STOP_AT), stop)

    resumed = make_session(config, data)
    load_checkpoint(saved[0], resumed.scorer.model, resumed.optimizer)
    fit(resumed, Progress(step=STOP_AT), StopRequest())
    wanted, got = everything(straight), everything(resumed)
    assert wanted.keys() == got.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []
    size = sum(file.stat().st_size for file in saved[0].glob("*.safetensors"))
    assert size <= checkpoint_bytes(resumed.scorer.model, optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "paged-adamw-8bit"])
def test_b1_a_snapshot_shares_no_memory_with_what_trains(
    make_config: Callable[[str, str], Config], data: PreparedData, tmp_path: Path, optimizer: str
) -> None:
    config = make_config("lora, whole embeddings", optimizer)
    session = make_session(config, data)
    fit(session, Progress(step=3), StopRequest())
    before = everything(session)
    snapshot = take_snapshot(tmp_path, "id", session.scorer.model, session.optimizer, Progress(step=5))
    with torch.no_grad():
        for parameter in session.parameters.values():
            parameter.add_(1.0)
            for state in session.optimizer.state[parameter].values():
                if isinstance(state, torch.Tensor):
                    state.zero_()
    directory = write_checkpoint(RunDirectory(tmp_path), snapshot)
    fresh = make_session(config, data)
    load_checkpoint(directory, fresh.scorer.model, fresh.optimizer)
    after = everything(fresh)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_b3_no_checkpoint_holds_what_is_not_finite(make_config: Callable[[str, str], Config], data: PreparedData, tmp_path: Path) -> None:
    session = make_session(make_config("lora", "adamw"), data)
    fit(session, Progress(step=3), StopRequest())
    first = next(iter(session.parameters.values()))
    session.optimizer.state[first]["exp_avg_sq"][0, 0] = float("inf")
    with pytest.raises(DivergedError, match="exp_avg_sq is not finite"):
        take_snapshot(tmp_path, "id", session.scorer.model, session.optimizer, Progress(step=5))


def snapshot_of(step: int, **tensors: torch.Tensor) -> Snapshot:
    return Snapshot(Progress(step=step), {}, {"adapter_model.safetensors": tensors}, lambda _: None)


def test_b9_an_empty_adapter_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="nothing to save"):
        write_checkpoint(RunDirectory(tmp_path), snapshot_of(1))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_b6_one_write_at_a_time_and_training_does_not_wait_for_it(tmp_path: Path) -> None:
    may_end, writing, most, told = threading.Event(), [], [], []

    def write(snapshot: Snapshot) -> Path:
        writing.append(snapshot.progress.step)
        most.append(len(writing))
        assert may_end.wait(60)
        writing.remove(snapshot.progress.step)
        return tmp_path / str(snapshot.progress.step)

    with CheckpointWriter(write, lambda step, path: told.append((step, path.name))) as writer:
        writer.submit(snapshot_of(1))
        writer.poll()
        assert told == []  # it is still being written, and nobody waited
        threading.Timer(0.05, may_end.set).start()
        writer.submit(snapshot_of(2))
        assert told == [(1, "1")]
    assert told == [(1, "1"), (2, "2")]
    assert max(most) == 1


def write_in_vain(*then: BaseException | None) -> None:
    """Save with a disk that is full: once, and for each of ``then`` raise it, or save again where it is None."""

    def fail(_: Snapshot) -> Path:
        raise HardwareError("no space left on device")

    with CheckpointWriter(fail, lambda *_: None) as writer:
        writer.submit(snapshot_of(1))
        for error in then:
            if error is not None:
                raise error
            writer.submit(snapshot_of(2))
            raise AssertionError("the second save did not look at the first")


def test_b7_a_write_that_failed_is_told_by_the_next_save_or_at_the_end() -> None:
    with pytest.raises(HardwareError, match="no space"):
        write_in_vain()
    with pytest.raises(HardwareError, match="no space"):
        write_in_vain(None)


def test_b2_an_interruption_does_not_claim_a_checkpoint_that_failed() -> None:
    with pytest.raises(HardwareError, match="no space"):
        write_in_vain(RunInterruptedError("a checkpoint is saved", signal_number=15))
    with pytest.raises(DivergedError) as caught:
        write_in_vain(DivergedError("nan"))
    assert [problem.what for problem in caught.value.problems] == ["nan", "no space left on device"]


def test_b6_rotation_goes_by_step_and_keeps_the_best_and_what_is_newer_than_it_knows(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for age, step in enumerate((1, 2, 3, 4, 9)):
        directory = write_checkpoint(run, snapshot_of(step, weight=torch.ones(2) * step))
        os.utime(directory, (1e9 - age, 1e9 - age))  # the newest looks oldest, as after a restore
    rotate(run, newest=4, keep=1, best_step=2)
    assert run.checkpoint_steps() == [2, 4, 9]
    (run.checkpoint(9) / "adapter_model.safetensors").write_bytes(b"x")
    write_checkpoint(run, snapshot_of(5, weight=torch.ones(2)))
    (run.checkpoint(5) / "state.json").write_text("{")
    with pytest.raises(VerificationError):
        rotate(run, newest=5, keep=1, best_step=None)
    assert run.checkpoint_steps() == [2, 4, 5, 9]
    verify(run.checkpoint(4))
    assert load_file(run.checkpoint(4) / "adapter_model.safetensors")["weight"].tolist() == [4, 4]
