"""Memory against what real modules, real graphs and real optimizers hold, byte by byte; nothing here looks at the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.load import load_config
from finetune.config.schema import Config, FourBit
from finetune.hardware import Machine
from finetune.model.adapters import attach, trainable
from finetune.model.fast import accelerate
from finetune.model.head import target_losses
from finetune.model.load import load_base
from finetune.model.methods import Given
from finetune.model.tokens import enlarge
from finetune.planning.activations import arithmetic, kept
from finetune.planning.groups import assign_groups
from finetune.planning.lookup import find_shape
from finetune.planning.memory import PARTS, PROCESS, Memory, Setting, estimate_memory, floor_memory, setting_of
from finetune.planning.parameters import count_parameters
from finetune.planning.resolve import resolve
from finetune.planning.states import state_bytes
from finetune.training.optimizer import build_optimizer

ROOT = Path(__file__).parents[2]
TOKENS = 192
LLAMA_70B = "meta-llama/Meta-Llama-3-70B"


def config_of(model: Path | str, **sections: Any) -> Config:
    tuning = {"method": "lora", "rank": 8, "alpha": 8} | sections.pop("tuning", {})
    data = {"train": [{"source": "rows.jsonl"}]}
    return Config.model_validate({"model": {"id": str(model)}, "tuning": tuning, "data": data, "output": "out"} | sections)


def setting(**changes: Any) -> Setting:
    usual = {"kind": "cuda", "precision": "bf16", "compute_dtype": "bf16", "tokens": 4096, "checkpointing": True, "optimizer": "adamw"}
    return Setting(**(usual | changes))


def memory_of(config: Config, where: Setting) -> Memory:
    shape = find_shape(config.model)
    return estimate_memory(shape, count_parameters(shape, config), config, where)


# --- activations: what autograd saves ------------------------------------------------------------------------------------------------


@contextmanager
def saved(model: Any) -> Iterator[list[int]]:
    """Bytes of every tensor that the graph keeps inside the block, views once, without the model's own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, tuple[int, Any]] = {}
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    sizes.extend(size for size, _ in found.values())


def kept_by_graph(directory: Path, config: Config, rows: int) -> int:
    bf16 = config.train.precision == "bf16"
    model = load_base(directory, config.quantization, torch.bfloat16 if bf16 else torch.float32, torch.device("cpu"))
    model = attach(model, config.tuning)
    if config.train.kernels == "auto":
        assert accelerate(model, config.tuning).packed
    model.train()
    ids = torch.randint(3, 300, (rows, TOKENS // rows), generator=torch.Generator().manual_seed(0))
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    supervised[0, -1] = True  # one position: the head keeps next to nothing
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), saved(model) as sizes:
        loss = target_losses(model, ids, torch.ones_like(ids), supervised).sum()
    assert loss.requires_grad
    return sum(sizes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"precision": "fp32"}},
        {"quantization": {"method": "nf4"}},
        {"quantization": {"method": "nf4"}, "tuning": {"dropout": 0.1}},
        {"tuning": {"dropout": 0.1}},
        {"tuning": {"targets": "attention"}},
        {"tuning": {"targets": ["q_proj", "down_proj"]}},
    ],
    ids=["lora", "fp32", "nf4", "nf4-dropout", "dropout", "attention", "named"],
)
def test_a_block_keeps_what_its_graph_keeps(changes: dict[str, Any], make_tiny_model: Callable[..., Path]) -> None:
    """The difference between four and two layers, so that nothing outside the blocks is in it."""
    changes = {"train": {"precision": "bf16"}} | changes
    found = []
    for layers in (2, 4):
        directory = make_tiny_model(num_hidden_layers=layers)
        found.append(kept_by_graph(directory, config_of(directory, **changes), rows=2))
    config = config_of(directory, **changes)
    size = 2 if config.train.precision == "bf16" else 4
    how = arithmetic(find_shape(config.model), config, "cpu", size, size)
    expected = kept(find_shape(config.model), config, how, TOKENS // 2) * TOKENS * 2
    # copies of A and B in the type of products belong to the whole run, not to a token
    copies = 0 if how.own_layers or size == 4 else 2 * count_parameters(find_shape(config.model), config).trainable // 2
    assert expected + copies == pytest.approx(found[1] - found[0], rel=0.02)


# --- weights and states --------------------------------------------------------------------------------------------------------------


def test_a_quantized_base_is_the_bytes_of_its_modules(make_tiny_model: Callable[..., Path]) -> None:
    directory = make_tiny_model(tied=False)
    config = config_of(directory, quantization={"method": "nf4"})
    model = load_base(directory, FourBit(method="nf4"), torch.bfloat16, torch.device("cpu"))
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        if state := getattr(parameter, "quant_state", None):
            constants = (state.absmax, state.state2.absmax)
            total += sum(tensor.numel() * tensor.element_size() for tensor in constants)
    parts = memory_of(config, setting()).parts
    assert parts["base"] + parts["embeddings"] == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("tuning", [{}, {"method": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize("method", ["adamw", "lion", "adafactor", "muon", "galore"])
def test_states_are_those_of_the_optimizer(method: str, tuning: dict[str, Any], tiny_model_dir: Path) -> None:
    if method == "galore" and not tuning:
        pytest.skip("galore is for full tuning")
    sections: dict[str, Any] = {"tuning": tuning} if not tuning else {}
    config = config_of(tiny_model_dir, optimizer={"method": method} | ({"galore": {"rank": 16}} if method == "galore" else {}), **sections)
    if tuning:
        config = Config.model_validate(config.model_dump() | {"tuning": tuning})
    model = attach(load_base(tiny_model_dir, config.quantization, torch.float32, torch.device("cpu")), config.tuning)
    parameters = trainable(model)
    optimizer = build_optimizer(parameters, assign_groups(parameters, config.optimizer), config.optimizer)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor) and value.ndim]
    held = sum(tensor.numel() * tensor.element_size() for tensor in states)
    assert state_bytes(count_parameters(find_shape(config.model), config), config, method) == pytest.approx(held, rel=0.001)


def test_states_of_8_bits_are_a_quarter() -> None:
    config = config_of(LLAMA_70B, quantization={"method": "nf4"})
    exact, small = (memory_of(config, setting(optimizer=method)) for method in ("adamw", "paged-adamw-8bit"))
    assert small.parts["optimizer"] == pytest.approx(exact.parts["optimizer"] / 4, rel=0.02)
    assert (exact.spillable, small.spillable) == (0, small.parts["optimizer"])


# --- pages of files ------------------------------------------------------------------------------------------------------------------


def in_the_file(model: Any, directory: Path) -> int:
    """Bytes of the tensors of ``model`` that lie in the mapped files of ``directory``, each place once."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split()
        if name.startswith(f"{directory}/"):
            spans.append(tuple(int(end, 16) for end in span.split("-")))
    places = {parameter.data_ptr(): parameter.numel() * parameter.element_size() for parameter in model.parameters()}
    return sum(size for place, size in places.items() if any(start <= place < end for start, end in spans))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone tells what is mapped")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantization": {"method": "nf4"}},
        {"train": {"precision": "fp32"}},
        {"full": True},
        {"new_tokens": True},
        {"new_tokens": True, "quantization": {"method": "nf4"}},
    ],
    ids=["bf16", "nf4", "fp32", "full", "new-tokens", "new-tokens-nf4"],
)
def test_a_base_that_is_not_converted_is_pages_of_its_file(changes: dict[str, Any], make_tiny_model: Callable[..., Path]) -> None:
    directory = make_tiny_model(tied=False)
    changes = {"train": {"precision": "bf16"}} | changes
    ids = (320, 321) if changes.pop("new_tokens", False) else ()
    tuning: dict[str, Any] = {"embeddings": "new-tokens"} if ids else {}
    full = changes.pop("full", False)
    config = config_of(directory, tuning=tuning, **changes)
    whole = config.model_dump() | {"model": {"id": str(directory), "new_tokens": ["<a>", "<b>"][: len(ids)]}}
    config = Config.model_validate(whole | ({"tuning": {"method": "full"}} if full else {}))
    precision = config.train.precision
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = load_base(directory, config.quantization, dtype, torch.device("cpu"))
    enlarge(model, ids)
    model = attach(model, config.tuning, Given(new_ids=ids))
    memory = memory_of(config, setting(kind="cpu", precision=precision, compute_dtype=precision))
    libraries = memory_of(config, setting(kind="cpu")).parts["process"] - PROCESS["cpu"]
    assert memory.pages - memory.parts["mapped"] - libraries == pytest.approx(in_the_file(model, directory), abs=2)


def test_own_memory_is_without_pages_of_files_and_refusals_keep_the_base() -> None:
    plain, small = (
        memory_of(config_of("builtin:smollm2-135m", quantization={"method": method}), setting(kind="cpu", tokens=1024))
        for method in ("none", "nf4")
    )
    assert plain.total - plain.own == plain.pages
    assert plain.pages >= plain.parts["base"] + plain.parts["embeddings"] + plain.parts["mapped"]
    assert plain.firm == plain.total - plain.parts["mapped"]
    assert plain.own < small.own < small.firm < plain.firm
    on_gpu = memory_of(config_of("builtin:smollm2-135m"), setting())
    assert on_gpu.own == on_gpu.total


def test_small_tensors_lie_in_the_holes_of_large_ones() -> None:
    """Attention of short examples is kept in tensors of a tile; that of longer ones is computed again."""
    config = config_of("builtin:smollm2-135m")
    kept, again = (
        memory_of(config, setting(kind="cpu", tokens=1024, checkpointing=False, example_tokens=length)).parts for length in (256, 257)
    )
    probabilities = 30 * 1024 / 256 * 9 * (64 * 64 + 64 * 128 + 64 * 192 + 64 * 256) * 2  # blocks, examples, heads, tiles, bytes
    assert kept["activations"] - again["activations"] == pytest.approx(probabilities)
    assert again["reserve"] - kept["reserve"] == pytest.approx(probabilities)


# --- the whole -----------------------------------------------------------------------------------------------------------------------


def test_parts_have_their_order_and_sum() -> None:
    memory = memory_of(config_of(LLAMA_70B, quantization={"method": "nf4"}), setting())
    assert list(memory.parts) == list(PARTS)
    assert memory.total == sum(memory.parts.values())
    assert all(size >= 0 for size in memory.parts.values())


def test_seventy_billion_in_four_bits_fit_on_48_gb() -> None:
    """A small micro-batch and checkpointing; neither without."""
    config = config_of(LLAMA_70B, quantization={"method": "nf4"}, tuning={"rank": 16, "alpha": 16})
    usable = 47 * 2**30
    assert memory_of(config, setting(tokens=2048, example_tokens=2048)).total < usable
    assert memory_of(config, setting(tokens=2048, example_tokens=2048, checkpointing=False)).total > usable
    assert memory_of(config, setting(tokens=16384, example_tokens=4096)).total > usable
    # figures of a hand calculation: 68.45 billion weights at 4.127 bits, two matrices of 1.051 billion in bf16
    parts = memory_of(config, setting()).parts
    assert parts["base"] / 2**30 == pytest.approx(32.9, abs=0.05)
    assert parts["embeddings"] / 2**30 == pytest.approx(3.9, abs=0.05)


def test_more_takes_more() -> None:
    config = config_of(LLAMA_70B)
    usual = memory_of(config, setting())
    assert memory_of(config, setting(tokens=8192)).total > usual.total
    assert memory_of(config, setting(checkpointing=False)).total > usual.total
    assert memory_of(config_of(LLAMA_70B, tuning={"rank": 16, "alpha": 16}), setting()).total > usual.total
    assert memory_of(config_of(LLAMA_70B, quantization={"method": "nf4"}), setting()).total < usual.total
    assert memory_of(config_of(LLAMA_70B, quantization={"method": "int8"}), setting()).total < usual.total
    assert memory_of(config_of(LLAMA_70B, train={"trainable_dtype": "bf16"}), setting()).total < usual.total
    assert memory_of(config_of(LLAMA_70B, tuning={"embeddings": "full"}), setting()).total > usual.total


def test_full_tuning_takes_sixteen_bytes_a_parameter_and_its_copies() -> None:
    config = Config.model_validate(config_of("meta-llama/Llama-3.2-1B").model_dump() | {"tuning": {"method": "full"}})
    parts = memory_of(config, setting()).parts
    weights = sum(parts[name] for name in ("base", "embeddings", "trained", "gradients", "optimizer"))
    assert weights == pytest.approx(16 * find_shape(config.model).total, rel=0.001)


def test_a_spread_base_is_shared_and_gathered_block_by_block() -> None:
    config = config_of(LLAMA_70B)
    whole, copied, spread = (
        memory_of(config, setting(world=world, strategy=strategy)).parts for world, strategy in ((1, "ddp"), (4, "ddp"), (4, "fsdp"))
    )
    assert whole == copied
    assert spread["base"] == pytest.approx(whole["base"] / 4, abs=1)
    assert spread["gathered"] == pytest.approx(whole["base"] / 40, abs=1)  # two of eighty blocks
    assert {name: spread[name] for name in ("embeddings", "trained", "gradients")} == {
        name: whole[name] for name in ("embeddings", "trained", "gradients")
    }
    offloaded = config.model_copy(update={"distributed": config.distributed.model_copy(update={"strategy": "fsdp", "offload": True})})
    assert memory_of(offloaded, setting(world=4, strategy="fsdp")).parts["base"] == 0


def test_cores_of_a_cpu_that_share_a_step_each_hold_gradients_and_logits() -> None:
    config = config_of("builtin:smollm2-135m")
    one, two = (memory_of(config, setting(kind="cpu", tokens=1024, checkpointing=False, threads=threads)).parts for threads in (1, 2))
    assert two["gradients"] == 2 * one["gradients"]
    assert two["logits"] == 2 * one["logits"]
    assert two["activations"] == one["activations"]
    # where an example would not fit in a share, nothing is shared
    assert memory_of(config, setting(kind="cpu", tokens=512, checkpointing=False, threads=2)).parts["gradients"] == one["gradients"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_floor_lies_below_every_estimate(path: Path) -> None:
    config = load_config(path).config
    shape = find_shape(config.model)
    parameters = count_parameters(shape, config)
    for machine in (Machine("cpu", "a CPU", 2, 2**34, bf16=True), Machine("cuda", "a GPU", 1, 2**36, bf16=True)):
        resolved = resolve(config, machine)
        where = setting_of(resolved, machine.kind)
        floor = floor_memory(shape, parameters, config, where)
        for tokens in (16, where.tokens):
            memory = estimate_memory(shape, parameters, config, replace(where, tokens=tokens, example_tokens=min(tokens, 512)))
            assert floor.total < memory.total
