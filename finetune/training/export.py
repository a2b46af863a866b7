"""The result of a run: adapter (or model), tokenizer, chat template and model card in one sealed directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune.config.schema import Bitfit, Config, Full, Houlsby, LoftqInit, Lora
from finetune.model.adapters import save
from finetune.model.builtin import public_name
from finetune.model.correction import FILE as LOFTQ_FILE
from finetune.model.correction import MOVED
from finetune.model.pissa import save_plain
from finetune.runs import RunDirectory, sealed_directory, write_json, write_text
from finetune.training.checkpoints import Progress, load_weights


def export(run: RunDirectory, config: Config, tokenizer: Any, model: Any, progress: Progress) -> Path:
    """Write the final adapter, or the best one where early stopping was on; returns its directory."""
    step = progress.step
    if config.train.early_stopping is not None and progress.best_step is not None:
        step = progress.best_step
        load_weights(run.checkpoint(step), model)
    destination = run.model if isinstance(config.tuning, Full) else run.adapter
    with sealed_directory(destination) as directory:
        model.config.use_cache = True  # off while training; the result is for inference
        if (run.path / MOVED).is_file():
            save_plain(model, run.path, directory)
        else:
            save(model, directory)
        tokenizer.save_pretrained(directory)
        if (run.path / LOFTQ_FILE).is_file():
            shutil.copyfile(run.path / LOFTQ_FILE, directory / LOFTQ_FILE)
        loss = progress.best_loss if step == progress.best_step else progress.last_loss
        figures = {"step": step, "validation_loss": loss, "best_step": progress.best_step, "best_loss": progress.best_loss}
        write_json(directory / "training.json", figures)
        write_text(directory / "README.md", _card(config, step, loss))
    return destination


def _card(config: Config, step: int, loss: float | None) -> str:
    """A model card with the metadata that model hubs read."""
    measured = "not measured" if loss is None else f"{loss:.4f} nats a supervised token"
    libraries: dict[type, str] = {Full: "transformers", Bitfit: "finetune", Houlsby: "finetune"}
    library = libraries.get(type(config.tuning), "peft")
    sources = "\n".join(f"- {source.source}" for source in config.data.train)
    return f"""---
base_model: {public_name(config.model.id)}
library_name: {library}
tags: [finetune, {config.tuning.method}]
---

# {Path(config.output).name}

Tuned from `{config.model.id}` with `finetune`: {config.tuning.method} on a base quantized as `{config.quantization.method}`,
{step} optimizer steps of {config.train.batch_size} examples.

Validation loss of these weights: {measured}.

{_tokens(config)}{_start(config)}Trained on:
{sources}
"""


def _tokens(config: Config) -> str:
    """How to load an adapter with new tokens without this program."""
    if not config.model.new_tokens or isinstance(config.tuning, Full):
        return ""
    return (
        f"Adds the tokens {', '.join(f'`{token}`' for token in config.model.new_tokens)}. Before PEFT loads the adapter, resize its\n"
        "base's embedding to the length of this tokenizer where it is shorter.\n\n"
    )


def _start(config: Config) -> str:
    """What a LoftQ adapter is without this program: its base is the plainly quantized one after a single iteration alone."""
    if not isinstance(config.tuning, Lora) or not isinstance(config.tuning.init, LoftqInit):
        return ""
    iterations = config.tuning.init.iterations
    if iterations == 1:
        return (
            "It started from LoftQ with one iteration: it belongs to the base quantized as above, on which PEFT loads it as it is,\n"
            "and not to the unquantized base.\n\n"
        )
    return (
        f"**Not for PEFT alone.** It started from LoftQ with {iterations} iterations, which also changed the weights that were quantized:\n"
        "on a base that is quantized plainly, PEFT loads it without complaint and computes something else. Merge it with\n"
        f"`finetune merge`, or give the base its weights first: `finetune.model.loftq.restore_base`, from `{LOFTQ_FILE}`.\n\n"
    )
