"""Hidden states that wait elsewhere: the gradient of checkpointing bit by bit, one copy a block and micro-batch, and nothing left over."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from finetune.config.schema import Config, Lora, NoQuantization, Prompt, RegexTargets, Tuning
from finetune.data.batches import Batch, collate
from finetune.errors import HardwareError
from finetune.hardware import detect
from finetune.model.adapters import attach, trainable
from finetune.model.fast import accelerate
from finetune.model.head import target_losses
from finetune.model.load import load_base
from finetune.model.offload import Held, PinnedMemory, Store, checkpoint_blocks
from finetune.planning.resolve import resolve
from finetune.training.build import Materials, build_model
from tests.training.test_batching_property import made

CPU, BLOCKS, WIDTH = torch.device("cpu"), 2, 64
EXAMPLES = made([(9, 30), (4, 50), (20, 11), (3, 7), (40, 2), (5, 60)])
MICRO_BATCHES = ((0, 1, 2), (3,), (4, 5))
LORA = Lora(method="lora", rank=4, alpha=8, targets="all-linear")


class Elsewhere:
    """Stands for the host: what is put here is really copied, and only the copy is read."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.alive: list[weakref.ref[Held]] = []
        self.taken = 0

    def put(self, hidden: torch.Tensor) -> Held:
        held = Held(hidden.clone(), hidden.device, hidden.nbytes)
        self.shapes.append(tuple(hidden.shape))
        self.alive.append(weakref.ref(held))
        return held

    def take(self, held: Held) -> torch.Tensor:
        self.taken += 1
        back = held.copy.clone()
        held.copy.fill_(float("nan"))  # whoever looked at the copy again would see it
        return back

    def in_use(self) -> int:
        return sum(each() is not None for each in self.alive)


def build(directory: Path, store: Store | None = None, tuning: Tuning = LORA, *, fast: bool = True) -> Any:
    """A model whose blocks are checkpointed, by the library alone where there is no ``store``."""
    torch.manual_seed(0)
    model = attach(load_base(directory, NoQuantization(), torch.float32, CPU), tuning)
    for name, parameter in trainable(model).items():  # B starts at zero, which would leave A without a gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if fast:
        accelerate(model, tuning)
    model.train()
    if store is None:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        checkpoint_blocks(model, store)
    return model


def losses(model: Any, piece: tuple[int, ...]) -> torch.Tensor:
    batch: Batch = collate([EXAMPLES[index] for index in piece])
    return target_losses(model, batch.ids, batch.attention, batch.supervised)


def step(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of a step of several micro-batches, accumulated as the loop does."""
    model.zero_grad()
    for number, piece in enumerate(MICRO_BATCHES):
        torch.manual_seed(number)
        losses(model, piece).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items() if parameter.grad is not None}


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() != set()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("tuning", "fast"),
    [
        (LORA, True),
        (LORA, False),
        (Lora(method="lora", rank=4, alpha=8, targets="all-linear", dropout=0.3), True),
        (Lora(method="lora", rank=4, alpha=8, targets=RegexTargets(regex=r".*layers\.1\..*q_proj")), True),
        (Prompt(method="prompt", tokens=3, text="Answer."), True),
    ],
    ids=["packed", "padded", "dropout", "last block alone", "prompt"],
)
def test_gradients_are_those_of_checkpointing_bit_by_bit(tuning: Tuning, fast: bool, tiny_model_dir: Path) -> None:
    expected, store = step(build(tiny_model_dir, tuning=tuning, fast=fast)), Elsewhere()
    require_equal(step(build(tiny_model_dir, store, tuning, fast=fast)), expected)
    assert len(store.shapes) == BLOCKS * len(MICRO_BATCHES), "one tensor a block and micro-batch"
    assert {shape[-1] for shape in store.shapes} == {WIDTH}, "hidden states, and no mask, position or rotation"
    assert store.in_use() == 0


def test_one_blocks_hidden_states_are_back_at_a_time(tiny_model_dir: Path) -> None:
    store = Elsewhere()
    model = build(tiny_model_dir, store)
    loss = losses(model, (0, 1)).sum()
    assert (store.in_use(), store.taken) == (BLOCKS, 0)
    loss.backward()
    assert (store.in_use(), store.taken) == (0, BLOCKS)


def test_the_hidden_states_themselves_are_given_up(tiny_model_dir: Path) -> None:
    """What was copied is freed on the device: nothing but the copy refers to a later block's input."""
    seen: list[StorageWeakRef] = []

    class Watching(Elsewhere):
        def put(self, hidden: torch.Tensor) -> Held:
            seen.append(StorageWeakRef(hidden.untyped_storage()))
            return super().put(hidden)

    loss = losses(build(tiny_model_dir, Watching()), (0, 1)).sum()
    assert [each.expired() for each in seen] == [True] * BLOCKS
    loss.backward()


def test_evaluation_copies_nothing(tiny_model_dir: Path) -> None:
    store = Elsewhere()
    model = build(tiny_model_dir, store)
    model.eval()
    with torch.no_grad():
        losses(model, (0,))
    assert store.shapes == []


def test_an_error_in_a_block_leaves_nothing_behind(tiny_model_dir: Path) -> None:
    expected = step(build(tiny_model_dir))
    store = Elsewhere()
    model = build(tiny_model_dir, store)
    last = model.get_base_model().model.layers[-1]
    whole = last.mlp.forward

    def failing(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of patience")

    last.mlp.forward = failing
    with pytest.raises(RuntimeError, match="out of patience"):
        losses(model, (0,))
    assert store.in_use() == 0
    copies = len(store.shapes)
    product = torch.ones(2, requires_grad=True) * torch.ones(2)
    product.sum().backward()
    assert len(store.shapes) == copies, "no hook outlives its block"
    last.mlp.forward = whole
    require_equal(step(model), expected)


def test_a_store_that_is_full_stops_the_pass_and_no_more(tiny_model_dir: Path) -> None:
    """As a device that is full: the measurement of micro-batches and the loop know that error."""
    expected = step(build(tiny_model_dir))

    class Small(Elsewhere):
        room = 1

        def put(self, hidden: torch.Tensor) -> Held:
            if self.in_use() >= self.room:
                raise torch.OutOfMemoryError("full")
            return super().put(hidden)

    store = Small()
    model = build(tiny_model_dir, store)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        losses(model, (0,))
    assert store.in_use() == 0
    store.room = BLOCKS
    require_equal(step(model), expected)


def test_hidden_states_of_a_cpu_stay_where_they_are(tiny_model_dir: Path) -> None:
    expected = step(build(tiny_model_dir))
    require_equal(step(build(tiny_model_dir, PinnedMemory(room=0))), expected)


@pytest.mark.parametrize(("room", "what"), [(0, "0.0 GiB of host memory"), (2**30, "cannot be pinned")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="here memory can be pinned")
def test_memory_that_is_full_or_cannot_be_pinned_is_a_device_that_is_full(room: int, what: str, tiny_model_dir: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=what):
        losses(build(tiny_model_dir, PinnedMemory(room, kind="cpu")), (0,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to move activations off")
def test_a_model_is_not_built_to_offload_where_there_is_no_gpu(tiny_model_dir: Path) -> None:
    config = Config.model_validate(
        {
            "model": {"id": str(tiny_model_dir)},
            "tuning": LORA.model_dump(),
            "data": {"train": [{"source": "a.jsonl"}]},
            "train": {"gradient_checkpointing": "offload"},
            "output": "out",
        }
    )
    with pytest.raises(HardwareError, match="there is no GPU here"):
        build_model(config, Materials(tiny_model_dir, resolve(config, detect()), (), EXAMPLES), CPU)
