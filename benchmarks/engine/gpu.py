"""On an NVIDIA GPU: speed on an 8B model, and peak memory of a 70B one. `make bench-gpu`, or `python -m benchmarks.engine.gpu`.

Neither needs a download: both models have the shape of Llama 3 and random weights, which compute as fast as trained ones. The 8B model is
written to disk once, and trained on it are whole commands, this project's and the plain loop's. The 70B model is built on the GPU layer
by layer, quantized as it grows, so that its 141 GB never exist; two steps of 4,096 tokens then run through the same functions as a run's.

Refuses to start without a GPU. `--tiny` goes through everything with small shapes on any machine; its figures mean nothing and are not
kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.engine import rounds, runs, table
from benchmarks.engine.tools import FINETUNE, PLAIN

ROWS, SCALE = 600, 4
"""The rows of the CPU benchmark, four times as long."""
SEVENTY_TOKENS, SEVENTY_RANK, SUPERVISED_SHARE = 4096, 64, 0.4
_BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Sizes:
    """The two shapes, and on what they run."""

    eight: LlamaConfig
    seventy: LlamaConfig
    tokens: int
    rank: int
    device: str
    rows: int
    scale: int


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> LlamaConfig:
    """A Llama 3 of these sizes."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
        dtype=_BF16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


LLAMA_8B = (4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = (8192, 28672, 80, 64, 8, 128256)


def full() -> Sizes:
    """What is measured."""
    return Sizes(llama(*LLAMA_8B), llama(*LLAMA_70B), SEVENTY_TOKENS, SEVENTY_RANK, "cuda", ROWS, SCALE)


def tiny() -> Sizes:
    """The same in small, for any machine."""
    small = llama(64, 128, 2, 4, 2, 49152)
    return Sizes(small, small, 64, 4, "cpu", 24, 1)


# --- weights -------------------------------------------------------------------------------------------------------------------------


def tensors(config: LlamaConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes, a file's worth at a time: embedding and head, then every layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    yield {name: shape for name, shape in shapes.items() if ".layers." not in name}
    for layer in range(config.num_hidden_layers):
        yield {name: shape for name, shape in shapes.items() if name.startswith(f"model.layers.{layer}.")}


def drawn(shape: tuple[int, ...], device: str = "cpu") -> torch.Tensor:
    """Ones for a norm, else normal with deviation 0.02, in bf16."""
    return torch.ones(shape, dtype=_BF16, device=device) if len(shape) == 1 else torch.randn(shape, dtype=_BF16, device=device) * 0.02


def write_random(config: LlamaConfig, directory: Path, tokenizer: Path, device: str) -> Path:
    """A model directory with random weights, a file a layer, and the tokenizer of another model whose vocabulary is smaller."""
    directory.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    torch.manual_seed(0)
    for number, shapes in enumerate(tensors(config)):
        file = f"model-{number:05}.safetensors"
        save_file({name: drawn(shape, device).cpu() for name, shape in shapes.items()}, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / name, directory / name)
    config.save_pretrained(directory)
    return directory


# --- 8B: speed -----------------------------------------------------------------------------------------------------------------------


def eight(sizes: Sizes, count: int, directory: Path) -> list[dict[str, Any]]:
    """Rounds of this project and the plain loop, LoRA and NF4."""
    model = write_random(sizes.eight, directory / "model-8b", runs.smollm2(), sizes.device)
    work = runs.prepare_work(sizes.rows, model=model, scale=sizes.scale)
    checkpointed = ("--grouped", "--micro", "1", "--checkpointing", "--device", sizes.device)
    found = []
    for number in range(count):
        for nf4 in (False, True):
            for tool, settings in ((FINETUNE, ()), (PLAIN, checkpointed)):
                row = runs.run(tool, runs.job(work, tool, nf4=nf4, seed=number), work, settings, score=False)
                found.append({"round": number, "variant": "NF4" if nf4 else "LoRA"} | row)
                print(json.dumps(found[-1]), flush=True)
    return found


# --- 70B: memory ---------------------------------------------------------------------------------------------------------------------


def quantized(config: LlamaConfig, device: str) -> Any:
    """A model whose linear layers are NF4, double quantized, except its head; one bf16 weight exists at a time."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=_BF16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, _four_bit(module, device))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(drawn(tuple(parameter.shape), device), requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # its frequencies are no parameters
    model.is_loaded_in_4bit = True  # so that PEFT takes its adapters for 4-bit layers
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def _four_bit(linear: nn.Linear, device: str) -> bnb.nn.Linear4bit:
    with torch.device("meta"):
        found = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=_BF16, quant_type="nf4")
    weight = drawn((linear.out_features, linear.in_features), device)
    found.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=found).to(device)
    return found


def seventy(sizes: Sizes) -> dict[str, Any]:
    """Peak memory in bytes of two steps on one example of ``sizes.tokens`` tokens, as a run would compute them."""
    from finetune.config.schema import Lora
    from finetune.model.adapters import attach, count_parameters, trainable
    from finetune.model.fast import accelerate
    from finetune.model.head import target_losses
    from finetune.model.quantize import disable_cpu_repacking

    torch.manual_seed(0)
    tuning = Lora(method="lora", rank=sizes.rank, alpha=sizes.rank)
    base = quantized(sizes.seventy, sizes.device)
    disable_cpu_repacking(base)
    scalars = count_parameters(base)
    model = attach(base, tuning)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    accelerate(model, tuning)
    model.train()
    trained = list(trainable(model).values())
    optimizer = bnb.optim.PagedAdamW8bit(trained, lr=1e-4) if sizes.device == "cuda" else torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(10, sizes.seventy.vocab_size, (1, sizes.tokens), device=sizes.device)
    supervised = torch.rand(ids.shape, device=sizes.device) < SUPERVISED_SHARE
    if sizes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses = []
    for _ in range(2):
        with torch.autocast(sizes.device, _BF16):
            loss = target_losses(model, ids, torch.ones_like(ids), supervised).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    found = {"scalars": scalars, "trainable": sum(parameter.numel() for parameter in trained), "tokens": sizes.tokens, "losses": losses}
    if sizes.device == "cuda":
        found |= {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
    return found


# --- the command ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("8b", "70b"), help="only this part")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="small shapes on any machine, to see that everything runs")
    chosen = parser.parse_args()
    if not chosen.tiny and not torch.cuda.is_available():
        print(
            "error: there is no NVIDIA GPU here, and this benchmark measures one\n  fix: run it where nvidia-smi lists one", file=sys.stderr
        )
        return 4
    sizes, found = tiny() if chosen.tiny else full(), {}
    if chosen.part in (None, "70b"):
        found["70b"] = seventy(sizes)
        print(json.dumps(found["70b"]), flush=True)
    if chosen.part in (None, "8b"):
        found["8b"] = eight(sizes, chosen.rounds, runs.WORK / ("tiny" if chosen.tiny else "gpu"))
    if not chosen.tiny:
        results = rounds.Results()
        results.found["gpu"] = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__} | results.found.get("gpu", {}) | found
        results.save()
        if "machine" in results.found:  # the page needs the CPU's part too
            results.path.with_suffix(".md").write_text(table.markdown(results.found), encoding="utf-8")
    return int(any("failed" in row for row in found.get("8b", [])))


if __name__ == "__main__":
    sys.exit(main())
