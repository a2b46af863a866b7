"""The result of a run: adapter (or model), tokenizer, chat template and model card in one sealed directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from finetune.card import Subject, card, code, library_of, nats, shown_base, shown_quantization, use_adapter, use_model
from finetune.config.schema import Config, Full, LoftqInit, Lora
from finetune.model.adapters import save
from finetune.model.builtin import resolve_model
from finetune.model.correction import FILE as LOFTQ_FILE
from finetune.model.correction import MOVED
from finetune.model.pissa import save_plain
from finetune.model.quantize import bnb_config
from finetune.runs import FIGURES, RunDirectory
from finetune.sealed import read_json, sealed_directory, verify, write_json, write_text
from finetune.training.checkpoints import Progress, load_weights


def export(run: RunDirectory, config: Config, tokenizer: Any, model: Any, progress: Progress) -> Path:
    """Write the final adapter, or the best one where early stopping was on; returns its directory."""
    step = progress.step
    if config.train.early_stopping is not None and progress.best_step is not None:
        step = progress.best_step
        verify(run.checkpoint(step))
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
        how = {"run_steps": progress.step, "stopped_early": progress.stopped_early, "sessions": len(run.sessions())}
        write_json(directory / FIGURES, figures | how | {"base": _base(run, config, model.config.dtype)})
        write_text(directory / "README.md", _card(run, config, step, loss, model.config.dtype))
    return destination


def _base(run: RunDirectory, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """What the result was trained on, for those who have its directory alone."""
    return {
        "id": config.model.id,
        "revision": config.model.revision,
        "fingerprint": read_json(run.environment)["identity"]["fingerprints"]["base"],
        "quantization": config.quantization.model_dump(mode="json"),
        "dtype": "bf16" if dtype == torch.bfloat16 else "fp32",
        "new_tokens": list(config.model.new_tokens),
    }


def _card(run: RunDirectory, config: Config, step: int, loss: float | None, dtype: torch.dtype) -> str:
    """The model card of an adapter, or of the whole model after full tuning."""
    whole = isinstance(config.tuning, Full)
    settings = bnb_config(config.quantization, dtype)
    if whole:
        use = use_model()
    elif library_of(config) == "peft":
        use = use_adapter(config, str(dtype).removeprefix("torch."), settings.to_dict() if settings else None)
    else:
        use = (
            "from pathlib import Path\n\nfrom finetune.model.adapters import load\n\n"
            'model = load(base, Path("DIR"))  # base: the model, loaded by transformers'
        )
    return card(
        config,
        resolve_model(config.model.id, config.model.revision),
        Subject(
            relation="finetune" if whole else "adapter",
            summary=f"Tuned from {shown_base(config)} with `finetune`: {config.tuning.method} on a base {shown_quantization(config)}, "
            f"{step} optimizer steps of up to {config.train.batch_size} examples.",
            figures={
                "Validation loss before training": "not measured by training; `finetune eval RUN` measures it",
                "Validation loss of these weights": nats(loss),
            },
            use=use,
            commands=("finetune train config.yaml", "finetune eval RUN"),
            notes=tuple(filter(None, (_tokens(config), _start(config), _history(run)))),
            losses={} if loss is None else {"loss": round(loss, 6)},
        ),
    )


def _history(run: RunDirectory) -> str:
    """What one command cannot reproduce: settings that changed while the run was on its way."""
    notes = [note for session in run.sessions() for note in session["notes"] if session["changes"]]
    listed = "\n".join(f"- {code(note)}" for note in notes)
    return f"**Changed on its way**: what stands under Reproduce is how it ended. It was resumed with\n\n{listed}" if notes else ""


def _tokens(config: Config) -> str:
    """How to load an adapter with new tokens without this program."""
    if not config.model.new_tokens or isinstance(config.tuning, Full):
        return ""
    return (
        f"Adds the tokens {', '.join(map(code, config.model.new_tokens))}. Before PEFT loads the adapter, resize its\n"
        "base's embedding to the length of this tokenizer where it is shorter."
    )


def _start(config: Config) -> str:
    """What a LoftQ adapter is without this program: its base is the plainly quantized one after a single iteration alone."""
    if not isinstance(config.tuning, Lora) or not isinstance(config.tuning.init, LoftqInit):
        return ""
    iterations = config.tuning.init.iterations
    if iterations == 1:
        return (
            "It started from LoftQ with one iteration: it belongs to the base quantized as above, on which PEFT loads it as it is,\n"
            "and not to the unquantized base."
        )
    return (
        f"**Not for PEFT alone.** It started from LoftQ with {iterations} iterations, which also changed the weights that were quantized:\n"
        "on a base that is quantized plainly, PEFT loads it without complaint and computes something else. Merge it with\n"
        f"`finetune merge`, or give the base its weights first: `finetune.model.loftq.restore_base`, from `{LOFTQ_FILE}`."
    )
