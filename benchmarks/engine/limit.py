"""The machine's limit: the operations that LoRA cannot do without, over the rate at which this machine multiplies matrices.

Operations of matrix products alone, two for each multiply-add. Elementwise work, the optimizer and everything that is computed twice count
nothing, so that no program reaches 100 %. For T tokens in examples of s tokens each, of which S carry loss:

    frozen linear layers   forward 2 N T, gradient of their input 2 N T; theirs is not computed. N: their weights, embeddings not counted.
                           The first layer's q, k and v hand no gradient to the frozen embeddings: less 2 N_qkv T.
    LoRA                   6 P T: forward, gradient of the input and of the weights, 2 each. P: adapter weights.
    attention              forward q k^T and p v, backward dv, dp, dq, dk: six products of 2 d heads s(s+1)/2 operations a layer, causal.
    head                   forward 2 V h, gradient of the hidden state 2 V h, on supervised positions only; it is frozen.

2 N a token forward and 2 N for each gradient: Kaplan et al. 2020 (2001.08361), section 2.1, where training everything gives 6 N; freezing
the weights leaves 4 N. The attention term: Hoffmann et al. 2022 (2203.15556), appendix F, halved for the causal mask.

The rate is measured on the model's own shapes, forward and backward, on micro-batches of `TOKENS` tokens, with as many threads as torch
takes. Run as a program: `python -m benchmarks.engine.limit`; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS, HEAD_TOKENS = 1024, 256
"""Rows of the measured products: a micro-batch, and its supervised part."""
REPEATS = 15


@dataclass(frozen=True, slots=True)
class Linear:
    """A frozen linear layer."""

    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """N."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Shape:
    """What a Llama multiplies."""

    layers: int
    attention: tuple[Linear, ...]
    """q, k, v of one layer."""
    others: tuple[Linear, ...]
    """o, gate, up, down of one layer."""
    head: Linear
    attended: int
    """d heads: width of the queries of all heads."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Of a Llama's config.json."""
        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        width = config.get("head_dim") or hidden // heads
        queries, keys = width * heads, width * config["num_key_value_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            attention=(Linear(hidden, queries), Linear(hidden, keys), Linear(hidden, keys)),
            others=(Linear(queries, hidden), Linear(hidden, inner), Linear(hidden, inner), Linear(inner, hidden)),
            head=Linear(hidden, config["vocab_size"]),
            attended=queries,
        )


def operations(shape: Shape, rank: int, totals: Mapping[str, int]) -> dict[str, int]:
    """Operations of one epoch by part; ``totals`` are those of `data.totals`: tokens, supervised_tokens, squared_tokens."""
    tokens = totals["tokens"]
    linears = (*shape.attention, *shape.others)
    frozen = shape.layers * sum(linear.weights for linear in linears)
    adapter = shape.layers * rank * sum(linear.inputs + linear.outputs for linear in linears)
    return {
        "frozen": (4 * frozen - 2 * sum(linear.weights for linear in shape.attention)) * tokens,
        "lora": 6 * adapter * tokens,
        "attention": 6 * shape.layers * shape.attended * (totals["squared_tokens"] + tokens),
        "head": 4 * shape.head.weights * totals["supervised_tokens"],
    }


def limit(parts: Mapping[str, int], rates: Mapping[str, float], tokens: int) -> float:
    """Tokens a second: ``parts`` of an epoch, the head at its own rate and all else at that of the layers (operations a second)."""
    layers = sum(count for part, count in parts.items() if part != "head")
    return tokens / (layers / rates["layers"] + parts["head"] / rates["head"])


def measure(shape: Shape, dtype: Any, repeats: int = REPEATS) -> dict[str, list[float]]:
    """Operations a second of each repeat: all products of a layer, both ways, and those of the head; ``_cpu``: a processor second."""
    import torch

    def products(linears: tuple[Linear, ...], rows: int) -> list[tuple[Any, Any, Any]]:
        return [
            (
                torch.randn(rows, linear.inputs).to(dtype),
                torch.randn(linear.outputs, linear.inputs).to(dtype),
                torch.randn(rows, linear.outputs).to(dtype),
            )
            for linear in linears
        ]

    work = {"layers": products((*shape.attention, *shape.others), TOKENS), "head": products((shape.head,), HEAD_TOKENS)}
    found: dict[str, list[float]] = {part: [] for part in (*work, *(f"{part}_cpu" for part in work))}
    for repeat in range(repeats + 2):
        for part, members in work.items():
            began, used = time.perf_counter(), time.process_time()
            for rows, weight, gradient in members:
                torch.nn.functional.linear(rows, weight)
                torch.mm(gradient, weight)
            seconds, cpu = time.perf_counter() - began, time.process_time() - used
            if repeat >= 2:  # the first ones load code
                count = sum(4 * len(rows) * weight.numel() for rows, weight, _ in members)
                found[part].append(count / seconds)
                found[f"{part}_cpu"].append(count / cpu)
    return found


def main() -> None:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    shape = Shape.of(json.loads((parser.parse_args().model / "config.json").read_text(encoding="utf-8")))
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        rates = measure(shape, dtype)
        found[name] = {
            part: {"median": statistics.median(values), "min": min(values), "max": max(values)} for part, values in rates.items()
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
