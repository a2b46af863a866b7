"""Training equals textbook PyTorch and transformers' Trainer, however a global batch is cut, laid out or shared over processes (A10, A17).

Everything is seen from outside: a run leaves its start (checkpoint 0), the gradient of its first step (AdamW's first moment is a tenth of
it), a loss and rates for each step, and the final weights. The references compute with plain transformers and torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from finetune.data.stored import load_rows
from finetune.training.batching import global_batch

pytestmark = pytest.mark.xdist_group("equality")  # the references are computed once, and not by every worker

STEPS, ROWS, BATCH, RATE, DECAY, NORM = 20, 24, 7, 0.01, 0.05, 0.5  # batches of 7, 7, 7 and 3 rows: the last of an epoch is partial
LORA = {"method": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"}
CUTS = (16, 96, 4096)  # an example alone (longer than 16 tokens), several micro-batches, one
Reference = tuple[dict[str, torch.Tensor], list[float], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, chat_file: Path, train_here: Callable[..., Path]) -> Any:
    """(tuning, cut, kernels) -> finished run; with ``devices``, by the command line."""
    folder = tmp_path_factory.mktemp("equality")

    def get(tuning: dict[str, Any], cut: int, kernels: str, *, clip: float | None = None, begin: Callable[..., Path] = train_here) -> Path:
        path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
        config = {
            "model": {"id": str(tiny_model_dir)},
            "tuning": tuning,
            "optimizer": {"method": "adamw", "learning_rate": RATE, "weight_decay": DECAY},
            "schedule": {"method": "cosine", "warmup_steps": 0},
            "data": {"train": [{"source": str(chat_file)}], "max_tokens": 256},
            "train": {
                "epochs": 5,
                "max_steps": STEPS,
                "batch_size": BATCH,
                "max_grad_norm": clip,
                "precision": "fp32",
                "tokens_per_device": cut,
                "kernels": kernels,
                "checkpoint": {"every_steps": 1, "keep": 99},
            },
            "output": str(path.with_suffix("")),
        }
        path.write_text(json.dumps(config))
        return begin(path) and path.with_suffix("")

    return get


@pytest.fixture(scope="module")
def lora_run(run: Any) -> Path:
    return run(LORA, 4096, "plain")


@pytest.fixture(scope="module")
def full_run(run: Any) -> Path:
    return run({"method": "full"}, 4096, "plain")


def model_at_start(run: Path, base: Path) -> Any:
    """Plain transformers and PEFT, as the run's checkpoint before its first step says."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if (run / "adapter").exists():
        model = PeftModel.from_pretrained(model, run / "checkpoints" / "step-00000000", is_trainable=True)
    return model.train()


def rows_of(run: Path) -> list[tuple[list[int], list[bool]]]:
    return [(list(row.ids), list(row.mask)) for row in load_rows(run / "rows.safetensors")[0]]


def textbook(run: Path, base: Path, clip: float | None = None) -> Reference:
    """One example at a time, all its logits, one division a step; (first gradient, losses, final weights)."""
    model, rows = model_at_start(run, base), rows_of(run)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for p in trained.values() if p.ndim > 1]
    spared = [p for p in trained.values() if p.ndim == 1]
    adam = torch.optim.AdamW([{"params": decayed, "weight_decay": DECAY}, {"params": spared, "weight_decay": 0.0}], lr=RATE)
    first: dict[str, torch.Tensor] = {}
    losses = []
    for step in range(STEPS):
        batch = [rows[index] for index in global_batch(ROWS, BATCH, 0, step)]
        count = sum(sum(mask[1:]) for _, mask in batch)
        total = 0.0
        for ids, mask in batch:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            labels = torch.tensor([token if taught else -100 for token, taught in zip(ids, mask, strict=True)][1:])
            loss = functional.cross_entropy(logits, labels, reduction="sum") / count
            loss.backward()
            total += float(loss)
        first = first or {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(trained.values(), clip or math.inf)
        for group in adam.param_groups:
            group["lr"] = RATE * 0.5 * (1.0 + math.cos(math.pi * step / STEPS))
        adam.step()
        adam.zero_grad()
        losses.append(total)
    return first, losses, {name: p.detach().clone() for name, p in trained.items()}


@pytest.fixture(scope="module")
def of_lora(lora_run: Path, tiny_model_dir: Path) -> Reference:
    return textbook(lora_run, tiny_model_dir)


@pytest.fixture(scope="module")
def of_full(full_run: Path, tiny_model_dir: Path) -> Reference:
    return textbook(full_run, tiny_model_dir)


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "step"]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Final weights by the names that PEFT and transformers have for them in memory."""
    if (run / "adapter").exists():
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
        return {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    return load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


def require_equal(run: Path, reference: Reference) -> None:
    first, losses, final = reference
    moments = load_file(run / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    found = {name.removesuffix("/exp_avg"): moment / 0.1 for name, moment in moments.items() if name.endswith("/exp_avg")}
    assert found.keys() == first.keys()
    for name, gradient in first.items():
        if float(gradient.norm()):  # A's is zero while B is
            assert float((found[name] - gradient).norm() / gradient.norm()) <= 1e-6, name
        else:
            assert not bool(found[name].any())
    assert [row["loss"] for row in steps_of(run)] == pytest.approx(losses, rel=1e-5)
    weights = weights_of(run)
    for name, tensor in final.items():
        assert float((weights[name] - tensor).norm() / tensor.norm()) <= 1e-4, name


@pytest.mark.parametrize("kernels", ["plain", "auto"])
@pytest.mark.parametrize("cut", CUTS)
def test_a10_every_cut_padded_or_packed_equals_plain_pytorch(run: Any, of_lora: Reference, cut: int, kernels: str) -> None:
    require_equal(run(LORA, cut, kernels), of_lora)


@pytest.mark.parametrize(("cut", "kernels"), [(96, "auto"), (4096, "plain")])
def test_a10_full_tuning_with_a_tied_head_equals_plain_pytorch(run: Any, of_full: Reference, cut: int, kernels: str) -> None:
    require_equal(run({"method": "full"}, cut, kernels), of_full)


@pytest.mark.parametrize("cut", [96, 4096])  # with one micro-batch a step, the second process has none
def test_a10_a17_two_processes_equal_plain_pytorch(run: Any, finetune: Any, lora_run: Path, of_lora: Reference, cut: int) -> None:
    def begin(path: Path) -> Path:
        done = finetune("train", path, "--devices", "2")
        assert done.code == 0, done.err
        return path

    two = run(LORA, cut, "auto", begin=begin)
    require_equal(two, of_lora)
    assert [row["learning_rates"] for row in steps_of(two)] == [row["learning_rates"] for row in steps_of(lora_run)]
    assert steps_of(two)[0]["learning_rates"] == {"(rest)": RATE}


class Ordered(torch.utils.data.Sampler[int]):
    """Our order, epoch after epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        per_epoch = -(-ROWS // BATCH)
        for step in range(self.epoch * per_epoch, (self.epoch + 1) * per_epoch):
            yield from global_batch(ROWS, BATCH, 0, step)
        self.epoch += 1


class OurOrder(Trainer):
    """transformers' own, but for the order of examples."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        del train_dataset
        return Ordered()


@pytest.mark.parametrize(("rows", "accumulation"), [(BATCH, 1), (1, BATCH)])
def test_a10_a_run_equals_transformers_trainer(run: Any, tiny_model_dir: Path, tmp_path: Path, rows: int, accumulation: int) -> None:
    ours = run(LORA, 96, "auto", clip=NORM)
    data = [
        {"input_ids": ids, "labels": [token if taught else -100 for token, taught in zip(ids, mask, strict=True)]}
        for ids, mask in rows_of(ours)
    ]

    def padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        filled = {"input_ids": 0, "labels": -100}
        found = {key: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in batch]) for key, fill in filled.items()}
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
        return found | {"attention_mask": torch.tensor(mask)}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=RATE,
        weight_decay=DECAY,
        max_grad_norm=NORM,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    model = model_at_start(ours, tiny_model_dir)
    trainer = OurOrder(model=model, args=arguments, train_dataset=data, data_collator=padded)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in steps_of(ours)] == pytest.approx([row["loss"] for row in logged], rel=1e-5)
    assert [row["grad_norm"] for row in steps_of(ours)] == pytest.approx([row["grad_norm"] for row in logged], rel=1e-4)
    assert [row["learning_rates"]["(rest)"] for row in steps_of(ours)] == pytest.approx([row["learning_rate"] for row in logged], rel=1e-9)
    weights = weights_of(ours)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert float((weights[name] - parameter).norm() / parameter.norm()) <= 1e-4, name
