"""The validation loss of a finished adapter, whoever trained it: transformers and PEFT alone, no code of the tools that are compared.

Run as a program: `python -m benchmarks.engine.score --help`. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from benchmarks.engine.data import encode


def load(model: Path, adapter: Path | None, *, nf4: bool) -> Any:
    """Base and adapter in fp32; ``nf4``: the base as it was trained on, its products in fp32."""
    quantization = None
    if nf4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
        )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=quantization)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else scales are cut to bf16 at the first forward pass
    return (PeftModel.from_pretrained(base, adapter) if adapter else base).eval()


@torch.no_grad()
def loss(model: Any, rows: Any) -> float:
    """Mean nats a supervised token; every token counts the same. One row at a time: no padding."""
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].float()
        wanted = torch.tensor(row.supervised[1:])
        targets = torch.tensor(row.ids[1:])
        total += float(torch.nn.functional.cross_entropy(logits[wanted], targets[wanted], reduction="sum").double())
        count += int(wanted.sum())
    return total / count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "template", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--nf4", action="store_true")
    chosen = parser.parse_args()
    rows = encode(chosen.data, AutoTokenizer.from_pretrained(chosen.model), chosen.template.read_text(encoding="utf-8"))
    print(json.dumps({"loss": loss(load(chosen.model, chosen.adapter, nf4=chosen.nf4), rows)}))


if __name__ == "__main__":
    main()
