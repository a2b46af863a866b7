"""The gradient of a step depends on the global batch alone: every cut of it against a plain PyTorch reference (pitfall A10)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from finetune.config.schema import Config
from finetune.data.prepare import PreparedData, prepare
from finetune.data.render import Example, Renderer
from finetune.errors import DivergedError, VerificationError
from finetune.model.adapters import attach, trainable
from finetune.model.load import load_base
from finetune.planning.steps import count_steps
from finetune.scoring import Scorer
from finetune.training.batching import global_batch
from finetune.training.checkpoints import Progress
from finetune.training.groups import assign_groups
from finetune.training.loop import Session, _require_change, fit
from finetune.training.metrics import StepDone
from finetune.training.optimizer import build_optimizer, rate_factor
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


def reference(config: Config, data: PreparedData) -> tuple[torch.Tensor, list[float]]:
    """Plain PyTorch: one example at a time through the model's own forward, textbook cross-entropy, one division a step."""
    torch.manual_seed(0)
    model = attach(load_base(Path(config.model.id), config.quantization, torch.float32, torch.device("cpu")), config.tuning).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay)
    steps, losses = count_steps(config, len(data.train)), []
    for step in range(steps.total):
        batch: list[Example] = [data.train[i] for i in global_batch(len(data.train), config.train.batch_size, config.seed, step)]
        total = torch.zeros(())
        for example in batch:
            logits = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
            for position, supervised in enumerate(example.mask):
                if supervised:
                    total = total - logits[position - 1, example.ids[position]]
        loss = total / sum(example.supervised for example in batch)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm or math.inf)
        for group in adam.param_groups:
            group["lr"] = config.optimizer.learning_rate * rate_factor(config.schedule, steps, step)
        adam.step()
        losses.append(float(loss))
    return torch.cat([parameter.detach().flatten() for parameter in parameters]), losses


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path, chat_file: Path, data: PreparedData) -> tuple[torch.Tensor, list[float]]:
    return reference(make_config(tiny_model_dir, chat_file), data)


@pytest.mark.parametrize("max_tokens", [1, 64, 150, 10_000])
def test_a10_every_cut_equals_plain_pytorch(
    tiny_model_dir: Path, chat_file: Path, data: PreparedData, expected: tuple[torch.Tensor, list[float]], max_tokens: int
) -> None:
    session, rows = make_session(make_config(tiny_model_dir, chat_file), data, max_tokens=max_tokens)
    fit(session, Progress(), StopRequest())
    assert [row.loss for row in rows] == pytest.approx(expected[1], rel=1e-5)
    assert torch.allclose(weights(session), expected[0], atol=2e-5)


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


def test_a16_validation_loss_does_not_depend_on_the_batch(tiny_model_dir: Path, chat_file: Path, data: PreparedData) -> None:
    session, _ = make_session(make_config(tiny_model_dir, chat_file), data)
    losses = [Scorer(session.scorer.model, torch.device("cpu"), "fp32", size).mean_loss(data.train) for size in (1, 100, 10_000)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] == pytest.approx(losses[2], abs=1e-6)


@pytest.mark.parametrize(("dtype", "advice"), [("bf16", "set train.trainable_dtype: fp32"), ("fp32", "raise their learning rate")])
def test_a12_what_bf16_rounded_away_is_said_to_be_that(tiny_model_dir: Path, chat_file: Path, dtype: str, advice: str) -> None:
    config = make_config(tiny_model_dir, chat_file, trainable_dtype=dtype)
    with pytest.raises(VerificationError, match="1 trainable tensors did not change, first a") as caught:
        _require_change({"a": (1.0, 2.0), "b": (0.0, 0.0)}, {"a": (1.0, 2.0), "b": (1.0, 1.0)}, config)
    assert caught.value.problems[0].fix.startswith(advice)
