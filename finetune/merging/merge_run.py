"""`finetune merge`: a finished run's adapter folded into its base, or exported in another form."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from finetune.config.schema import Config, Full, Houlsby, NoQuantization, Prefix, Prompt
from finetune.data.general import general_blocks
from finetune.errors import ConfigError
from finetune.finished import load_run
from finetune.merging.cards import export_card, merged_card
from finetune.merging.destination import require_destination
from finetune.merging.exports import ExportOptions, ExportReport, export_measured
from finetune.merging.inputs import Base, MergeSource
from finetune.merging.merge import MergeOptions, MergeReport, merge_measured
from finetune.merging.reference import Reference, probe_of, reference_of
from finetune.merging.reload import Probe
from finetune.model.load import DTYPES
from finetune.model.tokens import token_ids
from finetune.runs import RunDirectory
from finetune.sealed import write_json

_ROWS = 256
"""Rows that a merge is verified on: enough for a loss to three digits, few enough for a laptop."""


def merge_run(run: RunDirectory, config: Config, destination: Path, *, base: Base, options: MergeOptions) -> MergeReport:
    """Merge ``run`` into ``destination`` and keep the record in the run's `merge.json`. Errors are those of `merge`."""
    require_mergeable(run, config)
    if options.compare_bases and isinstance(config.quantization, NoQuantization):
        raise ConfigError("there is one base only: the run's was not quantized", where=str(run.path), fix="merge without --compare-bases")
    source, reference = measured(run, config, destination, base, options)
    _free_memory()
    with_card = replace(options, card=partial(merged_card, config, source.base_dir))
    report = merge_measured(reference, source, destination, with_card)
    write_json(run.path / "merge.json", {"destination": str(report.destination), **report.as_json()})
    return report


def export_run(run: RunDirectory, config: Config, destination: Path, *, base: Base, options: ExportOptions) -> ExportReport:
    """Export ``run`` to ``destination`` and keep the record in the run's `export-KIND.json`. Errors are those of `export_measured`."""
    require_mergeable(run, config)
    source, reference = measured(run, config, destination, base, MergeOptions(force=options.force))
    _free_memory()
    with_card = replace(options, card=partial(export_card, config, source.base_dir))
    report = export_measured(reference, source, destination, with_card)
    write_json(run.path / f"export-{options.kind}.json", {"destination": str(report.destination), **report.as_json()})
    return report


def _free_memory() -> None:
    """The adapter model is gone: it and the merged one, which a process of its own loads, would fill the memory or the GPU together."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured(run: RunDirectory, config: Config, destination: Path, base: Base, options: MergeOptions) -> tuple[MergeSource, Reference]:
    """What is merged, and what its adapter model computes."""
    finished = load_run(run, config)
    ends = {finished.renderer.tokenizer.eos_token_id, finished.renderer.end_of_turn} - {None}
    source = MergeSource(
        finished.base,
        finished.directory,
        config.quantization,
        finished.dtype,
        adapter_dtype=DTYPES[config.train.trainable_dtype],
        base=base,
        loftq=finished.loftq,
        new_ids=token_ids(finished.renderer.tokenizer, config.model.new_tokens),
        end_ids=tuple(sorted(ends)),
        device=finished.device.type,
    )
    require_destination(destination.absolute(), (source.base_dir, source.adapter_dir), force=options.force)
    general = Probe.of(general_blocks(finished.renderer)) if options.compare_bases else None
    return source, reference_of(finished.model, source, probe_of(finished.rows[:_ROWS]), general)


def require_mergeable(run: RunDirectory, config: Config) -> None:
    """ConfigError for full tuning, and for methods whose parameters are no change of a weight of the base."""
    if isinstance(config.tuning, Full):
        raise ConfigError("full tuning leaves a whole model: there is nothing to merge", where=str(run.path), fix=f"use {run.model}")
    match config.tuning:
        case Prompt():
            why = "its virtual tokens stand before the input and are no weights of the base"
        case Prefix():
            why = "its keys and values belong to tokens that no input has"
        case Houlsby():
            why = "its bottleneck layers are not linear, so that no weight of the base can take them in"
        case _:
            return
    loader = "finetune.model.adapters.load" if isinstance(config.tuning, Houlsby) else "peft.PeftModel.from_pretrained"
    raise ConfigError(
        f"{config.tuning.method} cannot be merged: {why}",
        where=str(run.path),
        fix=f"serve the base with the adapter: load {run.adapter} with {loader}",
    )
