"""A peer: LoRA with transformers and PEFT in a loop, as an ordinary competent user writes it.

Batches are padded to their longest row, which rows of similar length in one batch keep short; the loss is taken on the assistant's words
only, averaged over the words of the whole optimizer step; adapters are fp32 and products run under autocast in bf16, or all in fp32.
Run as a program: `python -m benchmarks.engine.plain --help`. Prints one JSON object per optimizer step.
"""

from __future__ import annotations

import argparse
import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_cosine_schedule_with_warmup

Row = tuple[list[int], list[int]]
"""Ids and labels; -100 where there is no loss."""


def read(path: Path, tokenizer: Any) -> list[Row]:
    """Rows as ids and labels."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True)
        found.append((row["input_ids"], [t if m else -100 for t, m in zip(row["input_ids"], row["assistant_masks"], strict=True)]))
    return found


def batches(rows: list[Row], size: int, seed: int, *, grouped: bool) -> list[list[Row]]:
    """Shuffled batches; ``grouped`` sorts within pools of 50 batches first, as transformers' group_by_length does."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    if grouped:
        pools = [order[start : start + 50 * size] for start in range(0, len(order), 50 * size)]
        order = [index for pool in pools for index in sorted(pool, key=lambda index: -len(rows[index][0]))]
    found = [[rows[index] for index in order[start : start + size]] for start in range(0, len(order), size)]
    if grouped:
        random.Random(seed).shuffle(found)
    return found


def collate(rows: list[Row], pad: int) -> dict[str, torch.Tensor]:
    """(b, t) ids, labels and attention mask, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)

    def padded(values: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

    return {
        "input_ids": padded([ids for ids, _ in rows], pad),
        "labels": padded([labels for _, labels in rows], -100),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
    }


def load(settings: argparse.Namespace) -> Any:
    """Base and fresh adapter."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    quantization = None
    if settings.nf4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, quantization_config=quantization, device_map=settings.device)
    if settings.nf4:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.checkpointing)
    elif settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    return get_peft_model(model, LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"))


def train(settings: argparse.Namespace) -> None:
    """One epoch."""
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.chat_template = settings.template.read_text(encoding="utf-8")
    steps = batches(read(settings.data, tokenizer), settings.batch, settings.seed, grouped=settings.grouped)
    model = load(settings).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup, len(steps))
    autocast = torch.autocast(settings.device, torch.bfloat16) if settings.precision == "bf16" else nullcontext()
    for number, rows in enumerate(steps, 1):
        micros = [collate(rows[start : start + settings.micro], 0) for start in range(0, len(rows), settings.micro)]
        supervised = sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in micros)
        loss = 0.0
        for micro in micros:
            with autocast:
                part = model(**{name: value.to(settings.device) for name, value in micro.items()}, num_items_in_batch=supervised).loss
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(json.dumps({"step": number, "loss": loss, "tokens": sum(len(ids) for ids, _ in rows)}), flush=True)
    model.save_pretrained(settings.output)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "template", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", default="cpu")
    for flag in ("nf4", "grouped", "checkpointing"):
        parser.add_argument(f"--{flag}", action="store_true")
    for name, default in (("rank", 16), ("alpha", 32), ("batch", 8), ("micro", 8), ("warmup", 3), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
