"""Compiled blocks: the gradient of eager ones, no graph for a new length, the same names, told where it cannot work.

Most tests take what torch.compile captures without making kernels of it (`aot_eager`), which takes seconds instead of a minute.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from finetune.config.schema import Config, FourBit, Lora, NoQuantization, Quantization
from finetune.data.batches import collate
from finetune.errors import ConfigError, HardwareError
from finetune.hardware import detect
from finetune.model import attention
from finetune.model.adapters import attach, contents, trainable
from finetune.model.compiled import compile_blocks, require_compiler
from finetune.model.fast import accelerate
from finetune.model.head import target_losses
from finetune.model.load import load_base
from finetune.model.offload import checkpoint_blocks
from finetune.planning.resolve import resolve
from finetune.training.build import Materials, build_model
from tests.training.test_batching_property import made

CPU, BLOCKS, DEEP, PLAIN = torch.device("cpu"), 2, 10, NoQuantization()
EXAMPLES = made([(9, 30), (4, 50), (20, 11), (3, 7), (40, 2), (5, 60), (30, 30), (1, 80)])
FIRST, LATER = ((0, 1, 2), (3,), (4, 5), (6, 7, 0)), ((0,), (1, 2, 3, 4), (7, 6), (2,), (0, 4, 7))
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler, which torch.compile needs")
TUNING = {"method": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before or after, and the attention of other tests as it was."""
    monkeypatch.setitem(attention.KERNELS, "cpu", attention.KERNELS["cpu"])
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def deep_model_dir(make_tiny_model: Callable[..., Path]) -> Path:
    """The tiny model with more blocks than torch.compile keeps graphs of one function (8)."""
    return make_tiny_model(num_hidden_layers=DEEP)


def build(directory: Path, quantization: Quantization = PLAIN, *, fast: bool = True, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    tuning = Lora.model_validate(TUNING | {"dropout": dropout})
    model = attach(load_base(directory, quantization, torch.float32, CPU), tuning)
    for name, parameter in trainable(model).items():  # B starts at zero, which would leave A without a gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if fast:
        accelerate(model, tuning)
    return model.train()


def step(model: Any, pieces: tuple[tuple[int, ...], ...]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for number, piece in enumerate(pieces):
        torch.manual_seed(number)
        batch = collate([EXAMPLES[index] for index in piece])
        loss = target_losses(model, batch.ids, batch.attention, batch.supervised).sum()
        loss.backward()
        total += float(loss)
    return total, {name: parameter.grad.clone() for name, parameter in trainable(model).items() if parameter.grad is not None}


def require_close(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    """Within the rounding of fp32: 5e-6 of a tensor's length, where up to 7e-7 was seen."""
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys() != set()
    for name, tensor in expected[1].items():
        assert (found[1][name] - tensor).norm() <= 5e-6 * tensor.norm(), name


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("quantization", "options"),
    [
        (PLAIN, {"fast": True}),
        (PLAIN, {"fast": False}),
        (PLAIN, {"fast": True, "dropout": 0.3}),
        (FourBit(method="nf4"), {"fast": True}),
    ],
    ids=["own kernels", "plain kernels", "dropout", "nf4"],
)
def test_losses_and_gradients_are_those_of_eager_blocks_and_neither_lengths_nor_more_blocks_compile_anything(
    quantization: Quantization, options: dict[str, Any], tiny_model_dir: Path, deep_model_dir: Path
) -> None:
    eager, compiled = (build(tiny_model_dir, quantization, **options) for _ in range(2))
    assert compile_blocks(compiled, backend="aot_eager") == BLOCKS
    require_close(step(compiled, FIRST), step(eager, FIRST))
    first = graphs()
    assert first > 0, "something was compiled"
    require_close(step(compiled, LATER), step(eager, LATER))
    assert graphs() == first
    deep = build(deep_model_dir, quantization, **options)
    assert compile_blocks(deep, backend="aot_eager") == DEEP
    step(deep, FIRST)
    assert graphs() == first


def test_names_of_tensors_and_evaluation_stay_as_they_are(tiny_model_dir: Path) -> None:
    eager, compiled = (build(tiny_model_dir) for _ in range(2))
    compile_blocks(compiled, backend="aot_eager")
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in eager.named_modules()]
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    assert contents(compiled).tensors.keys() == contents(eager).tensors.keys()
    for model in (eager, compiled):
        model.eval()
    with torch.no_grad():
        batch = collate(EXAMPLES[:3])
        found, expected = (target_losses(model, batch.ids, batch.attention, batch.supervised) for model in (compiled, eager))
    assert torch.equal(found, expected)
    assert graphs() == 0


@needs_compiler
def test_kernels_that_a_compiler_made_give_the_same(tiny_model_dir: Path) -> None:
    eager, compiled = (build(tiny_model_dir, fast=False) for _ in range(2))
    compile_blocks(compiled)
    require_close(step(compiled, FIRST), step(eager, FIRST))


# --- what cannot work ----------------------------------------------------------------------------------------------------------------


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)  # stands for one that is there
    require_compiler("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(HardwareError, match=r"needs a C\+\+ compiler, and there is no no-such-compiler"):
        require_compiler("cpu")


def config_of(directory: Path, **train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"id": str(directory)},
            "tuning": TUNING,
            "data": {"train": [{"source": "a.jsonl"}]},
            "train": {"compile": True, "precision": "fp32", **train},
            "output": "out",
        }
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")
def test_what_would_compile_nothing_or_by_chance_is_refused(tiny_model_dir: Path) -> None:
    def built(config: Config) -> int:
        return build_model(config, Materials(tiny_model_dir, resolve(config, detect()), (), EXAMPLES), CPU).compiled

    with pytest.raises(ConfigError, match="nothing of a checkpointed block is compiled"):
        built(config_of(tiny_model_dir, gradient_checkpointing=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ConfigError, match="torch compiles for one thread"):
            built(config_of(tiny_model_dir))
        assert built(config_of(tiny_model_dir, kernels="plain")) == BLOCKS
        torch.set_num_threads(1)
        assert built(config_of(tiny_model_dir)) == BLOCKS
    finally:
        torch.set_num_threads(threads)


# --- beside checkpointing, and over a resumption -------------------------------------------------------------------------------------


def masked_attention(rows: list[torch.Tensor], bounds: torch.Tensor, _longest: int, scale: float) -> torch.Tensor:
    """What a GPU's kernel for sequences of varying length gives, as operations that a graph may hold."""
    query, key, value = rows
    places = torch.arange(query.shape[1])
    example = torch.searchsorted(bounds, places, right=True)
    seen = (example[:, None] == example[None]) & (places[:, None] >= places[None])
    found = torch.nn.functional.scaled_dot_product_attention(query[None], key[None], value[None], seen, scale=scale, enable_gqa=True)
    return found[0].transpose(0, 1)


def test_a_checkpointed_block_is_one_graph_where_attention_is_an_operation(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the own layers, norms and MLP, and the checkpoint around them."""
    models = []
    for compiles in (False, True):
        model = build(tiny_model_dir)
        checkpoint_blocks(model)
        if compiles:
            compile_blocks(model, backend="aot_eager")
        models.append(model)
    monkeypatch.setitem(attention.KERNELS, "cpu", masked_attention)
    require_close(step(models[1], FIRST), step(models[0], FIRST))
    assert graphs() > 0
    assert not counters["graph_break"]


@needs_compiler
def test_a2_a_resumed_run_is_the_whole_one_bit_by_bit(write_config: Any, train_here: Any, tmp_path: Path) -> None:
    train = {"epochs": 4, "max_steps": 4, "batch_size": 8, "precision": "fp32", "checkpoint": {"every_steps": 2}}
    path = write_config(train=train | {"compile": True, "kernels": "plain"}, schedule={"method": "constant"})
    whole, parts = (f"output={tmp_path / name}" for name in ("whole", "parts"))
    run = train_here(path, whole)
    train_here(path, parts, "train.max_steps=2")
    torch._dynamo.reset()  # as a new process
    resumed = train_here(path, parts, resume=True)
    eager = train_here(path, f"output={tmp_path / 'eager'}", "train.compile=false")
    found, expected, plain = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (resumed, run, eager))
    assert found.keys() == expected.keys() == plain.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-4)
