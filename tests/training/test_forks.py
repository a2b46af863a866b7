"""Forks: what threads compute, bit for bit; what one raises, or its death, is told here; none of them outlives the run."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune import process
from finetune.config.schema import Config
from finetune.data.batches import collate
from finetune.data.examples import Examples
from finetune.data.render import Example
from finetune.errors import DataError, HardwareError
from finetune.hardware import peak_memory
from finetune.model import adalora
from finetune.model.adapters import attach, trainable
from finetune.model.fast import accelerate
from finetune.model.load import load_base
from finetune.planning.groups import assign_groups
from finetune.planning.steps import count_steps
from finetune.scoring import Scorer
from finetune.training import loop
from finetune.training.checkpoints import Progress
from finetune.training.forks import Forks, can_fork
from finetune.training.input_clock import InputClock
from finetune.training.lanes import run_lanes
from finetune.training.loop import fit
from finetune.training.metrics import StepDone
from finetune.training.optimizer import build_optimizer
from finetune.training.session import Session
from finetune.training.signals import StopRequest
from tests.training.test_batching_property import made

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or torch.accelerator.is_available(), reason="forks are for Linux without an accelerator"),
    pytest.mark.usefixtures("own_process"),
]

CPU = torch.device("cpu")
ALONE = SimpleNamespace(process_index=0, num_processes=1)
SHAPE = [(20, 60), (70, 40), (10, 100), (60, 30), (90, 50), (40, 70), (15, 25), (100, 20)]
STEPS = 4  # of all rows, 900 tokens: enough for four lanes
MIB = 2**20


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the command line ran in this process; whatever the test did, it leaves no process."""
    monkeypatch.setattr(process._Kept, "by_process", True)
    yield
    assert not multiprocessing.active_children()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_fork() -> bool:
    return multiprocessing.parent_process() is not None


# --- a run ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run as the tests below compare it."""

    tuning: dict[str, Any]
    precision: str = "fp32"
    threads: int = 2
    max_tokens: int = 2048


@dataclass
class Ran:
    """What it came to."""

    rows: list[StepDone]
    gradients: list[list[torch.Tensor]]
    """Of each step, before they are clipped."""
    weights: list[torch.Tensor]
    moments: list[torch.Tensor]
    processes: list[int]
    """How many there were beside this one, in each step."""
    cuts: list[list[int]]
    """Micro-batches of each lane, for each step that had several."""
    pruned: int
    """Singular values that AdaLoRA took away."""


ATTENTION = ["q_proj", "v_proj"]
CASES = {
    "lora": Case({"method": "lora", "rank": 4}, max_tokens=290),
    "lora in bf16": Case({"method": "lora", "rank": 4}, "bf16", threads=4),
    "rslora": Case({"method": "lora", "rank": 4, "scaling": "rslora", "targets": "attention"}, "bf16", max_tokens=290),
    "dora": Case({"method": "lora", "rank": 2, "dora": True, "targets": "attention"}, threads=3),
    "dora in bf16": Case({"method": "lora", "rank": 2, "dora": True, "targets": "attention"}, "bf16"),
    "adalora": Case({"method": "adalora", "rank": 2, "init_rank": 4, "every_steps": 1, "targets": ATTENTION}, threads=3, max_tokens=450),
    "ia3": Case({"method": "ia3"}),
    "vera": Case({"method": "vera", "rank": 16, "targets": ATTENTION}, "bf16"),
}
"""``max_tokens`` under 600: several micro-batches a lane."""


def make_session(model_dir: Path, case: Case, batch_size: int = len(SHAPE)) -> tuple[Session, list[StepDone]]:
    examples = Examples.of(made(SHAPE))
    config = Config.model_validate(
        {
            "model": {"id": str(model_dir)},
            "tuning": {"alpha": 8, **case.tuning} if "lora" in case.tuning["method"] else case.tuning,
            "optimizer": {"learning_rate": 0.01, "weight_decay": 0.01},
            "schedule": {"method": "constant", "warmup_steps": 0},
            "data": {"train": [{"source": "unused.jsonl"}], "max_tokens": 256},
            "train": {"epochs": 9, "batch_size": batch_size, "max_steps": STEPS, "max_grad_norm": 0.5},
            "output": "unused",
        }
    )
    torch.manual_seed(0)
    model = attach(load_base(model_dir, config.quantization, torch.float32, CPU), config.tuning)
    accelerate(model, config.tuning)
    steps, parameters = count_steps(config, len(examples)), trainable(model)
    if adalora.is_adalora(model):
        adalora.plan_ranks(model, config.tuning, steps.total)  # type: ignore[arg-type]
    groups = assign_groups(parameters, config.optimizer)
    rows: list[StepDone] = []
    session = Session(
        config,
        steps,
        SimpleNamespace(train=examples, validation=[]),  # type: ignore[arg-type]
        Scorer(model, CPU, case.precision, case.max_tokens),
        build_optimizer(parameters, groups, config.optimizer),
        groups,
        ALONE,
        lambda row: rows.append(row) if isinstance(row, StepDone) else None,
        lambda _: None,
    )
    assert session.work is not None
    return session, rows


def ran(model_dir: Path, case: Case, monkeypatch: pytest.MonkeyPatch, *, forks: bool) -> Ran:
    session, rows = make_session(model_dir, case)
    found = Ran(rows, [], [], [], [], [], 0)

    def clip(tensors: Sequence[torch.Tensor], norm: float) -> torch.Tensor:
        found.gradients.append([tensor.grad.clone() for tensor in tensors if tensor.grad is not None])
        found.processes.append(len(multiprocessing.active_children()))
        return real_clip(tensors, norm)

    def run(lanes: Any, *rest: Any) -> torch.Tensor:
        found.cuts.append([len(lane) for lane in lanes])
        return run_lanes(lanes, *rest)

    real_clip = torch.nn.utils.clip_grad_norm_
    with monkeypatch.context() as patch, threads(case.threads):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        patch.setattr(loop, "run_lanes", run)
        if not forks:
            patch.setattr(process._Kept, "by_process", False)
        fit(session, Progress(), StopRequest())
    found.weights = [parameter.detach().clone() for parameter in session.parameters.values()]
    found.moments = [state[name] for state in session.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found.pruned = sum(int((value == 0).sum()) for name, value in session.parameters.items() if ".lora_E." in name)
    return found


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_forks_compute_what_threads_do_bit_for_bit(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Over several steps, so that what the optimizer and AdaLoRA's pruning change reaches them."""
    case = CASES[name]
    by_threads, by_forks = (ran(tiny_model_dir, case, monkeypatch, forks=forks) for forks in (False, True))
    assert by_threads.processes == [0] * STEPS
    assert by_forks.processes == [case.threads - 1] * STEPS
    assert by_forks.cuts == by_threads.cuts
    assert [len(cut) for cut in by_forks.cuts] == [case.threads] * STEPS
    assert (max(map(max, by_forks.cuts)) > 1) == (case.max_tokens < 2048)
    assert [row.loss for row in by_forks.rows] == [row.loss for row in by_threads.rows]
    assert len({row.loss for row in by_forks.rows}) == STEPS
    for one, other in zip(by_forks.gradients, by_threads.gradients, strict=True):
        assert same(one, other)
    assert same(by_forks.weights, by_threads.weights)
    assert same(by_forks.moments, by_threads.moments)
    assert by_forks.pruned == by_threads.pruned
    assert (by_forks.pruned > 0) == (name == "adalora")


def test_a_row_counts_the_memory_of_forks_and_what_they_waited_for(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the fork a micro-batch takes 0.2 s to be read; the last row of an epoch is a step without lanes."""
    session, rows = make_session(tiny_model_dir, Case({"method": "lora", "rank": 4}), batch_size=7)
    alone: list[int] = []

    def slow(examples: Sequence[Example]) -> Any:
        time.sleep(0.2 * in_fork())
        return collate(examples)

    def clip(*rest: Any) -> torch.Tensor:
        alone.append(peak_memory())
        return real_clip(*rest)

    real_clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(loop, "collate", slow)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with threads(2):
        fit(session, Progress(), StopRequest())
    assert [row.input_seconds >= 0.2 for row in rows] == [True, False, True, False]
    assert all(row.input_seconds <= row.seconds for row in rows)
    assert all(row.memory_bytes > peak + MIB for row, peak in zip(rows, alone, strict=True))


# --- forks alone ---------------------------------------------------------------------------------------------------------------------


class Beside:
    """Lanes of the pieces 1, 2, ..., the first here and each of the others in a fork; the loss of a piece is of one parameter."""

    def __init__(self, loss_of: Callable[[list[int], float], torch.Tensor], parameters: list[torch.nn.Parameter], forks: int = 1) -> None:
        self.clock, self.parameters, self._loss_of = InputClock(), parameters, loss_of
        self._lanes = [[[number + 1]] for number in range(forks + 1)]
        self.seen: list[int] = []
        """Processes that were there after each step of `run`, also after one that failed."""
        self.forks = Forks(loss_of, parameters, self.clock)

    def step(self, supervised: float = 1.0) -> float:
        assert self.forks.ready(len(self._lanes) - 1)
        submit = partial(self.forks.submit, supervised)
        return float(run_lanes(self._lanes, lambda piece: self._loss_of(piece, supervised), self.parameters, submit))

    def run(self, *steps: float, between: Callable[[], None] = lambda: None) -> None:
        """``steps`` of so many supervised tokens, with ``between`` called after each."""
        with self.forks.open():
            for supervised in steps:
                try:
                    self.step(supervised)
                finally:
                    self.seen.append(len(multiprocessing.active_children()))
                between()


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))


def test_what_replaced_a_parameter_s_tensor_reaches_forks() -> None:
    """As a quantizer or a loaded checkpoint does; afterwards changes in place reach them too."""
    weight = parameter()

    def loss_of(piece: list[int], supervised: float) -> torch.Tensor:
        return weight.square().sum() * piece[0] / supervised

    beside = Beside(loss_of, [weight])
    with beside.forks.open():
        assert beside.step(2.0) == 3 * 14 / 2
        weight.data = torch.tensor([2.0, 0.0, 1.0])
        assert beside.step() == 3 * 5
        assert weight.grad is not None
        assert weight.grad.tolist() == [12.0, 0.0, 6.0]
        with torch.no_grad():
            weight.add_(1)
        assert beside.step() == 3 * 14
        assert len(multiprocessing.active_children()) == 1


def test_a_fork_made_later_and_a_pass_that_replaces_compute_with_what_is_shared() -> None:
    """The second fork finds a parameter that has left the shared memory; in the first the pass itself puts another tensor in its place."""
    weight = parameter()

    def loss_of(piece: list[int], supervised: float) -> torch.Tensor:
        loss = weight.square().sum() * piece[0] / supervised
        if in_fork():
            weight.data = weight.data.clone()
        return loss

    beside = Beside(loss_of, [weight], forks=2)
    *few, last = beside._lanes
    with beside.forks.open():
        beside._lanes = few
        assert beside.step() == 3 * 14
        weight.data = torch.tensor([2.0, 0.0, 1.0])
        beside._lanes = [*few, last]
        assert beside.step() == 6 * 5
        with torch.no_grad():
            weight.add_(1)
        assert beside.step() == 6 * 14


def test_a_fork_that_stalls_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = parameter()
    monkeypatch.setattr("finetune.training.forks._STALL_S", 0.5)

    def loss_of(piece: list[int], supervised: float) -> torch.Tensor:
        if in_fork():
            time.sleep(60)
        return weight.sum() * piece[0] * supervised

    began = time.monotonic()
    with pytest.raises(HardwareError, match="gave no answer for"):
        Beside(loss_of, [weight]).run(1.0)
    assert time.monotonic() - began < 30
    assert not multiprocessing.active_children()


def test_a_kernel_that_does_not_tell_what_is_private_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = parameter()
    monkeypatch.setattr(Path, "is_file", lambda self: "smaps" not in str(self))
    beside = Beside(lambda piece, supervised: weight.sum() * piece[0] * supervised, [weight])
    with beside.forks.open():
        assert beside.step() == 3 * 6
        assert beside.forks.memory_bytes() == 0


def test_a_fork_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Its lane warns of what this one does, and a live view would be drawn over."""
    weight = parameter()

    def loss_of(piece: list[int], supervised: float) -> torch.Tensor:
        if in_fork():
            warnings.warn("in a fork", stacklevel=1)
        return weight.sum() * piece[0] * supervised

    beside = Beside(loss_of, [weight])
    with beside.forks.open():
        assert beside.step() == 3 * 6
    assert capfd.readouterr() == ("", "")


def test_gradients_are_of_what_each_lane_reached_and_lie_as_parameters_do() -> None:
    """One that no lane reached has none; one of the first step is not there in the second."""
    here, there, nowhere = (
        parameter(),
        torch.nn.Parameter(torch.arange(6.0).view(2, 3).T),
        torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
    )

    def loss_of(piece: list[int], supervised: float) -> torch.Tensor:
        return there.sum() * supervised if in_fork() and supervised < 3 else here.sum() * piece[0]

    beside = Beside(loss_of, [here, there, nowhere])
    with beside.forks.open():
        for supervised, wanted in ((2.0, 2.0), (1.0, 1.0), (3.0, None)):
            beside.step(supervised)
            assert here.grad is not None
            assert here.grad.tolist() == [3.0 if wanted is None else 1.0] * 3
            assert (None if there.grad is None else float(there.grad.mean())) == wanted
            assert nowhere.grad is None
            assert there.grad is None or there.grad.stride() == there.stride() == (1, 3)
            here.grad.mul_(5)  # as clipping does


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no kernel"),
        MemoryError("no room"),
        OSError(5, "the disk is gone", "rows.arrow"),
        ValueError("a shape"),
        DataError("a bad row", where="line 3", fix="mend it"),
    ],
)
def test_what_a_fork_raises_is_raised_here_and_tells_where(error: Exception) -> None:
    weight = parameter()

    def loss_of(piece: list[int], supervised: float) -> torch.Tensor:
        if piece[0] == 2:
            raise error
        if piece[0] == 3:
            time.sleep(60)  # nobody waits for it
        return weight.sum() * supervised

    beside, began = Beside(loss_of, [weight], forks=2), time.monotonic()
    with pytest.raises(type(error)) as caught:
        beside.run(1.0)
    assert beside.seen == [2]
    assert not multiprocessing.active_children()
    assert time.monotonic() - began < 30
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "problems", None) == getattr(error, "problems", None)
    (note,) = caught.value.__notes__
    assert "Traceback (most recent call last)" in note
    assert "in loss_of\n    raise error" in note


class OddError(Exception):
    """Cannot be made again from what it keeps."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


def test_an_error_that_cannot_be_sent_is_told() -> None:
    weight = parameter()

    def loss_of(piece: list[int], supervised: float) -> torch.Tensor:
        if in_fork():
            raise OddError("left", "right")
        return weight.sum() * piece[0] * supervised

    with pytest.raises(RuntimeError, match="OddError: leftright"):
        Beside(loss_of, [weight]).run(1.0)
    assert not multiprocessing.active_children()


def test_where_the_system_refuses_a_fork_lanes_go_on_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that may not be overcommitted, a limit of processes: it is asked for once, and what there is already stays until the end."""
    weight, asked = parameter(), list[int]()
    real = os.fork

    def second_refused() -> int:
        asked.append(len(asked))
        if len(asked) > 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real()

    monkeypatch.setattr(os, "fork", second_refused)
    beside = Beside(lambda piece, supervised: weight.sum() * piece[0] * supervised, [weight], forks=2)
    with beside.forks.open():
        with pytest.warns(UserWarning, match=r"refused .*Resource temporarily unavailable.*in threads"):
            assert not beside.forks.ready(2)
        assert not beside.forks.ready(1)
        assert len(asked) == 2
        assert len(multiprocessing.active_children()) == 1
    assert not multiprocessing.active_children()


def test_as_many_forks_as_a_step_has_lanes_besides() -> None:
    weight = parameter()
    beside = Beside(lambda piece, supervised: weight.sum() * piece[0] * supervised, [weight], forks=2)
    *few, last = beside._lanes
    with beside.forks.open():
        beside._lanes = few
        assert beside.step() == 6 * 3
        assert len(multiprocessing.active_children()) == 1
        beside._lanes = [*few, last]
        assert beside.step() == 6 * 6
        assert len(multiprocessing.active_children()) == 2


def test_what_this_process_s_own_lane_raises_ends_forks_that_compute() -> None:
    weight = parameter()

    def loss_of(piece: list[int], supervised: float) -> torch.Tensor:
        if in_fork():
            time.sleep(60)
        raise FloatingPointError(f"piece {piece[0]} of {supervised}")

    beside, began = Beside(loss_of, [weight], forks=2), time.monotonic()
    with pytest.raises(FloatingPointError, match="piece 1 of 1"):
        beside.run(1.0)
    assert beside.seen == [2]
    assert not multiprocessing.active_children()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("moment", ["in a step", "between steps"])
def test_a_fork_that_is_killed_ends_the_run_with_what_to_do(moment: str) -> None:
    weight = parameter()

    def loss_of(piece: list[int], supervised: float) -> torch.Tensor:
        if in_fork() and supervised == 2 and moment == "in a step":
            if piece[0] == 3:
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGKILL)
        return weight.sum() * supervised

    def kill() -> None:
        for child in multiprocessing.active_children() if moment == "between steps" else []:
            child.kill()
            child.join()

    beside, began = Beside(loss_of, [weight], forks=2), time.monotonic()
    with pytest.raises(HardwareError, match="a process that computes a part of each step has died") as caught:
        beside.run(1.0, 2.0, between=kill)
    assert beside.seen[0] == 2
    assert len(beside.seen) == 2
    assert not multiprocessing.active_children()
    assert time.monotonic() - began < 30
    (problem,) = caught.value.problems
    assert (caught.value.exit_code, problem.where) == (4, "training")
    assert "--resume" in problem.fix


def test_signals_that_ask_a_run_to_stop_do_not_reach_forks() -> None:
    """The terminal sends them to every process of the command."""
    weight = parameter()
    beside = Beside(lambda piece, supervised: weight.sum() * piece[0] * supervised, [weight])
    with beside.forks.open():
        assert beside.step() == 18
        (child,) = multiprocessing.active_children()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(child.pid or 0, number)
        assert beside.step(2.0) == 36
        assert multiprocessing.active_children() == [child]


def test_after_the_run_the_parameters_are_there_and_train() -> None:
    weight, frozen = torch.nn.Parameter(torch.arange(6.0).view(2, 3).T), torch.ones(3, 2)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    beside = Beside(lambda piece, supervised: (weight * frozen).sum() * piece[0] * supervised, [weight])
    with beside.forks.open():
        beside.step()
        (child,) = multiprocessing.active_children()
        optimizer.step()
    assert not multiprocessing.active_children()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid or 0, 0)
    expected = torch.arange(6.0).view(2, 3).T - 3
    del beside
    gc.collect()
    assert torch.equal(weight.detach(), expected)
    optimizer.zero_grad()
    (weight.square().sum() / 2).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert torch.equal(weight.detach(), torch.zeros(3, 2))
    assert torch.equal(weight.detach().clone().contiguous() + expected, expected)


def test_the_memory_of_forks_is_what_they_have_beside_the_weights() -> None:
    """Two forks: 64 MiB in one of them and 32 in the other; 128 MiB that do not train are read by both."""
    weight, frozen, kept = parameter(), torch.ones(128 * MIB // 4), list[torch.Tensor]()

    def loss_of(piece: list[int], supervised: float) -> torch.Tensor:
        if in_fork() and supervised == 2:
            kept.append(torch.ones(64 * MIB // 4 // (piece[0] - 1)))
        return weight.sum() * frozen.sum()

    beside = Beside(loss_of, [weight], forks=2)
    with beside.forks.open():
        assert beside.forks.memory_bytes() == 0
        beside.step()
        before = beside.forks.memory_bytes()
        assert 0 < before < 128 * MIB
        beside.step(2.0)
        grown = beside.forks.memory_bytes() - before
        assert 96 * MIB <= grown < 112 * MIB
        assert len(multiprocessing.active_children()) == 2
    assert not kept


def test_waiting_for_rows_in_a_fork_is_seen_and_seen_once() -> None:
    """Of lanes that wait at the same time, the longest; what this process waited for before it forked is not lost."""
    weight = parameter()

    def loss_of(piece: list[int], supervised: float) -> torch.Tensor:
        with beside.clock.reading():
            time.sleep(0.2 * (in_fork() and supervised == 2))
        return weight.sum() * piece[0]

    beside = Beside(loss_of, [weight], forks=2)
    with beside.clock.reading():
        time.sleep(0.3)
    with beside.forks.open():
        beside.step()
        assert beside.clock.take() >= 0.3
        for supervised in (1.0, 2.0, 1.0):
            beside.step(supervised)
            seconds = beside.clock.take()
            assert (0.2 <= seconds < 0.4) if supervised == 2 else (seconds < 0.2)
        assert len(multiprocessing.active_children()) == 2


def test_only_the_program_s_own_process_on_linux_without_an_accelerator_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_fork()
    for owner, name, value in (
        (process._Kept, "by_process", False),
        (sys, "platform", "darwin"),
        (torch.accelerator, "is_available", lambda: True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert not can_fork()
    assert can_fork()


@pytest.mark.parametrize("own", [False, True])
def test_a_script_s_process_is_not_the_program_s_until_it_says_so(own: bool) -> None:
    code = f"from finetune import process\n{'process.own()' if own else ''}\nprint(process.is_own())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{own}\n"
