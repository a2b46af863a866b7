"""The loop: what stops it, what it never waits for, what its memory does not depend on. What it computes: test_equality.py."""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from finetune.config.schema import Config
from finetune.data.batches import collate
from finetune.data.examples import Examples
from finetune.data.prepare import PreparedData, prepare
from finetune.data.render import Renderer
from finetune.errors import DivergedError, VerificationError
from finetune.model import attention
from finetune.model.adapters import attach, trainable
from finetune.model.fast import accelerate
from finetune.model.head import causal_model, head_kind, target_losses
from finetune.model.load import load_base
from finetune.planning.groups import assign_groups
from finetune.planning.steps import count_steps
from finetune.scoring import Scorer
from finetune.sealed import verify
from finetune.training.batching import global_batch
from finetune.training.checkpoints import Progress
from finetune.training.loop import _backward, _optimizer_step, fit
from finetune.training.metrics import StepDone
from finetune.training.optimizer import build_optimizer
from finetune.training.participation import require_change
from finetune.training.session import Session
from finetune.training.signals import StopRequest

ALONE = SimpleNamespace(process_index=0, num_processes=1)


@pytest.fixture(scope="module")
def data(tiny_model_dir: Path, chat_file: Path) -> PreparedData:
    config = make_config(tiny_model_dir, chat_file)
    return prepare(config.data, Renderer(AutoTokenizer.from_pretrained(tiny_model_dir)), 0)


def make_config(model: Path, chat: Path, **train: object) -> Config:
    return Config.model_validate(
        {
            "model": {"id": str(model)},
            "tuning": {"method": "lora", "rank": 4, "alpha": 8},
            "optimizer": {"learning_rate": 0.01},
            "data": {"train": [{"source": str(chat)}], "max_tokens": 256},
            "train": {"epochs": 2, "batch_size": 10, "max_grad_norm": 0.5, **train},
            "output": "unused",
        }
    )


def make_session(config: Config, data: PreparedData, *, max_tokens: int = 10_000) -> tuple[Session, list[StepDone]]:
    torch.manual_seed(0)
    model = attach(load_base(Path(config.model.id), config.quantization, torch.float32, torch.device("cpu")), config.tuning)
    parameters = trainable(model)
    groups = assign_groups(parameters, config.optimizer)
    rows: list[StepDone] = []
    session = Session(
        config,
        count_steps(config, len(data.train)),
        data,
        Scorer(model, torch.device("cpu"), "fp32", max_tokens),
        build_optimizer(parameters, groups, config.optimizer),
        groups,
        ALONE,
        lambda row: rows.append(row) if isinstance(row, StepDone) else None,
        lambda _: None,
    )
    return session, rows


def weights(session: Session) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in session.parameters.values()])


def test_an_epoch_sees_every_row_once_and_the_next_in_another_order() -> None:
    rows, size = 23, 5
    per_epoch = 5
    first = [index for step in range(per_epoch) for index in global_batch(rows, size, 3, step)]
    second = [index for step in range(per_epoch, 2 * per_epoch) for index in global_batch(rows, size, 3, step)]
    assert sorted(first) == sorted(second) == list(range(rows))
    assert first != second
    assert first != [index for step in range(per_epoch) for index in global_batch(rows, size, 4, step)]


def test_b3_a_loss_that_is_not_finite_stops_the_run(tiny_model_dir: Path, chat_file: Path, data: PreparedData) -> None:
    session, rows = make_session(make_config(tiny_model_dir, chat_file), data)
    name, parameter = next(iter(session.parameters.items()))
    before = weights(session)
    parameter.data[0, 0] = float("nan")
    with pytest.raises(DivergedError, match="step 1") as caught:
        fit(session, Progress(), StopRequest())
    assert "chat.jsonl:" in caught.value.problems[0].where
    assert not rows
    parameter.data[0, 0] = before[0] if name == next(iter(session.parameters)) else 0.0
    assert torch.equal(weights(session), before)


@pytest.mark.parametrize("broken", ["loss", "gradient", "validation"])
def test_b3_what_is_not_finite_in_step_5_leaves_the_checkpoint_of_step_4(
    write_config: Callable[..., Path], train_here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    training = {"epochs": 3, "batch_size": 8, "precision": "fp32", "tokens_per_device": 4096, "checkpoint": {"every_steps": 1}}
    config = write_config(train={**training, "evaluate": {"every_steps": 5}})  # one micro-batch a step
    calls = 0

    def wrong(model: Any, *batch: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        losses = target_losses(model, *batch)
        if calls == 5 and broken == "loss":
            return losses * math.nan
        if calls == 5 and broken == "gradient":
            losses.register_hook(lambda gradient: gradient * math.inf)
        return losses

    with monkeypatch.context() as patch:
        patch.setattr("finetune.training.loop.target_losses", wrong)
        patch.setattr("finetune.training.session.can_share", lambda *_: False)  # one call a step
        if broken == "validation":
            patch.setattr("finetune.scoring.target_losses", lambda *batch: target_losses(*batch) * math.inf)
        with pytest.raises(DivergedError, match="step 5") as caught:
            train_here(config)
    run = tmp_path / "run"
    assert caught.value.exit_code == 5
    assert broken == "validation" or re.search(r"rows .*chat.jsonl:\d+.* and 4 more", caught.value.problems[0].where)
    assert not (run / "adapter").exists()
    newest = run / "checkpoints" / "step-00000004"
    assert newest == max(path for path in (run / "checkpoints").iterdir())
    verify(newest)
    assert all(bool(torch.isfinite(tensor).all()) for file in newest.glob("*.safetensors") for tensor in load_file(file).values())
    assert train_here(config, resume=True) == run  # the good checkpoint is one that the run goes on from
    assert (run / "adapter" / "MANIFEST.json").is_file()


def test_b3_the_command_says_so_and_exits_5(finetune: Callable[..., Any], write_config: Callable[..., Path]) -> None:
    tuning = {"method": "lora", "rank": 4, "alpha": 1e38, "targets": "all-linear"}  # the square of any gradient overflows
    done = finetune("train", write_config(tuning=tuning, schedule={"warmup_steps": 0}))
    assert done.code == 5, done.err
    assert "is not finite in step 1; the step was not applied" in " ".join(done.err.split())
    assert "fix:" in done.err
    assert "Traceback" not in done.err


class Transfers(TorchDispatchMode):
    """Counts how often a value is read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_no_micro_batch_waits_for_the_device(
    tiny_model_dir: Path, chat_file: Path, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, where tensors have no values: whatever the host would wait for raises. Attention is that of a GPU."""
    session, _ = make_session(make_config(tiny_model_dir, chat_file), data)
    assert accelerate(session.scorer.model, session.config.tuning).packed
    core = causal_model(session.scorer.model)
    assert head_kind(core) == "plain"  # measured once a run
    monkeypatch.setitem(attention.KERNELS, "meta", attention.KERNELS["cuda"])
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    for parameter in session.scorer.model.to("meta").parameters():
        parameter.grad = None
    for embedding in [module for module in session.scorer.model.modules() if hasattr(module, "inv_freq")]:
        embedding.to("meta")
    session.scorer = replace(session.scorer, device=torch.device("meta"))
    pieces = [[0, 1, 2], [3]]
    total = sum(_backward(session, piece, 7, 40) for piece in pieces)
    assert isinstance(total, torch.Tensor)
    assert total.device.type == "meta"
    assert all(parameter.grad is not None for parameter in trainable(session.scorer.model).values())
    batch = collate([data.train[0]]).to(torch.device("meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):  # were the batch sent there first, it would have to be asked
        target_losses(session.scorer.model, batch.ids, batch.attention, batch.supervised)


def test_a_step_reads_as_many_values_for_one_micro_batch_as_for_ten(tiny_model_dir: Path, chat_file: Path, data: PreparedData) -> None:
    counts = []
    for cut in (16, 10_000):
        session, _ = make_session(make_config(tiny_model_dir, chat_file), data, max_tokens=cut)
        accelerate(session.scorer.model, session.config.tuning)
        _optimizer_step(session, 0, check_gradients=False)
        with Transfers() as seen:
            _optimizer_step(session, 1, check_gradients=False)
        counts.append(seen.count)
    assert counts[0] == counts[1]


class LiveBytes(TorchDispatchMode):
    """The most bytes that the results of torch's operations held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_b5_the_memory_of_validation_does_not_depend_on_its_rows(
    tiny_model_dir: Path, chat_file: Path, data: PreparedData, kernels: str
) -> None:
    session, _ = make_session(make_config(tiny_model_dir, chat_file), data, max_tokens=512)
    if kernels == "auto":
        accelerate(session.scorer.model, session.config.tuning)
    longest = max(data.train, key=lambda example: len(example.ids))
    session.scorer.mean_loss(Examples.of([longest] * 50))  # what is made once, such as masks, is there from now on
    peaks = []
    for rows in (50, 500):
        with LiveBytes() as seen:
            session.scorer.mean_loss(Examples.of([longest] * rows))
        peaks.append(seen.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_a11_a_trainable_tensor_outside_the_loss_is_refused(tiny_model_dir: Path, chat_file: Path, data: PreparedData) -> None:
    session, _ = make_session(make_config(tiny_model_dir, chat_file), data)
    session.parameters["stray"] = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(VerificationError, match="stray"):
        fit(session, Progress(), StopRequest())


def test_a12_trainable_weights_and_states_are_fp32(tiny_model_dir: Path, chat_file: Path, data: PreparedData) -> None:
    session, _ = make_session(make_config(tiny_model_dir, chat_file, max_steps=1), data)
    fit(session, Progress(), StopRequest())
    assert {parameter.dtype for parameter in session.parameters.values()} == {torch.float32}
    states = [value for state in session.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert states
    assert {state.dtype for state in states} == {torch.float32}


def test_early_stopping_takes_the_lowest_loss_whatever_its_patience_counts(
    tiny_model_dir: Path, chat_file: Path, data: PreparedData
) -> None:
    config = make_config(
        tiny_model_dir, chat_file, epochs=50, evaluate={"every_steps": 1}, early_stopping={"patience": 4, "min_delta": 1000.0}
    )
    session, _ = make_session(config, replace(data, validation=data.train[:4]))
    progress = fit(session, Progress(), StopRequest())
    assert progress.step == 5
    assert progress.best_step is not None
    assert progress.best_step > 1
    assert progress.patience_loss is not None
    assert progress.best_loss is not None
    assert progress.best_loss < progress.patience_loss


def test_early_stopping_stops(tiny_model_dir: Path, chat_file: Path, data: PreparedData) -> None:
    config = make_config(
        tiny_model_dir, chat_file, epochs=50, evaluate={"every_steps": 1}, early_stopping={"patience": 2, "min_delta": 1000.0}
    )
    session, rows = make_session(config, replace(data, validation=data.train[:4]))
    progress = fit(session, Progress(), StopRequest())
    assert progress.stopped_early
    assert (progress.step, len(rows)) == (3, 3)


def test_every_step_trains_whatever_measured_the_model_before_it(tiny_model_dir: Path, chat_file: Path, data: PreparedData) -> None:
    config = make_config(tiny_model_dir, chat_file, max_steps=3, evaluate={"every_steps": 1})
    session, _ = make_session(config, replace(data, validation=data.train[:4]))
    measuring: list[list[str]] = []

    def watch(row: object) -> None:
        if isinstance(row, StepDone):  # told right after the step
            measuring.append([name for name, module in session.scorer.model.named_modules() if not module.training])

    session.record = watch
    session.scorer.model.eval()
    fit(session, Progress(), StopRequest())
    assert measuring == [[], [], []]


def test_the_best_checkpoint_outlives_newer_ones_and_is_what_early_stopping_leaves(
    write_config: Callable[..., Path], train_here: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.5, 2.0, 1.5])
    monkeypatch.setattr("finetune.training.validation._validation_loss", lambda *_: next(losses))
    training = {"epochs": 4, "batch_size": 8, "precision": "fp32", "tokens_per_device": 512, "checkpoint": {"every_steps": 1, "keep": 1}}
    run = train_here(write_config(train={**training, "evaluate": {"every_steps": 1}, "early_stopping": {"patience": 3}}))
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000002", "step-00000005"]
    best, last, left = (
        load_file(run / place / "adapter_model.safetensors")
        for place in ("checkpoints/step-00000002", "checkpoints/step-00000005", "adapter")
    )
    assert all(torch.equal(left[name], tensor) for name, tensor in best.items())
    assert not all(torch.equal(left[name], tensor) for name, tensor in last.items())
    rows = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "evaluation"]
    assert [row["best"] for row in rows] == [True, True, False, False, False]


def test_a16_validation_loss_does_not_depend_on_the_batch(tiny_model_dir: Path, chat_file: Path, data: PreparedData) -> None:
    session, _ = make_session(make_config(tiny_model_dir, chat_file), data)
    losses = [Scorer(session.scorer.model, torch.device("cpu"), "fp32", size).mean_loss(data.train) for size in (1, 100, 10_000)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] == pytest.approx(losses[2], abs=1e-6)


@pytest.mark.parametrize(("dtype", "advice"), [("bf16", "set train.trainable_dtype: fp32"), ("fp32", "raise their learning rate")])
def test_a12_what_bf16_rounded_away_is_said_to_be_that(tiny_model_dir: Path, chat_file: Path, dtype: str, advice: str) -> None:
    config = make_config(tiny_model_dir, chat_file, trainable_dtype=dtype)
    with pytest.raises(VerificationError, match="1 trainable tensors did not change, first a") as caught:
        require_change({"a": (1.0, 2.0), "b": (0.0, 0.0)}, {"a": (1.0, 2.0), "b": (1.0, 1.0)}, config)
    assert caught.value.problems[0].fix.startswith(advice)
