"""`combine`: several adapters of one base become one model or one adapter, proven to be what the formulas say, or nothing at all.

Like a merge, the output is written to a temporary sibling, loaded by plain transformers (and PEFT) in a fresh process, compared with the
dense sum in memory and with rows of every weight (`combine_reference`), and only then renamed to its destination.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.config.combine import AdapterOutput, ModelOutput, Plan, weights_of
from finetune.config.schema import NoQuantization
from finetune.errors import ConfigError, DataError, Problem, VerificationError
from finetune.merging.combine_deltas import Combination, Progress, Updates, describe
from finetune.merging.combine_members import Members, find_members
from finetune.merging.combine_reference import Dense, dense_model, fits_in_memory, sampled_rows, weights_from
from finetune.merging.combine_report import CombineReport, Loss, combination_card
from finetune.merging.combine_write import (
    ModelReport,
    copy_adapter_companions,
    factors_in,
    require_low_rank,
    write_adapter,
    write_model,
)
from finetune.merging.companions import read_model_config
from finetune.merging.destination import clear_leftovers, require_destination
from finetune.merging.identity import LiveRows, require_rows
from finetune.merging.inputs import MergeSource
from finetune.merging.reload import Measurement, Probe
from finetune.merging.rounding import DoesNotFitError
from finetune.merging.trials import DTYPES, GAIN_TO_KEEP, Candidate, Trial, candidates
from finetune.merging.verify import Parity, compare, kl_limit, measure_in_fresh_process, measured_by
from finetune.model.builtin import public_name
from finetune.model.quantize import bnb_config
from finetune.runs import COMBINED
from finetune.sealed import sealed_directory, write_json, write_text


@dataclass(frozen=True, slots=True)
class _Proof:
    """What every trial is compared with."""

    rows: tuple[LiveRows, ...]
    dense: Measurement | None
    loss_base: float
    probe: Probe
    source: MergeSource


def combine(plan: Plan, destination: Path, *, force: bool = False, progress: Progress = lambda *_: None) -> CombineReport:
    """Write what ``plan`` says into ``destination``; ``progress(stage, tensors)`` follows the work.

    ConfigError: the destination is taken, or the plan names what cannot be combined. VerificationError: a file is damaged, an adapter does
    not fit its base, or the result is not the combination. HardwareError: the disk is full. The destination is then as it was.
    """
    destination = destination.absolute()
    clear_leftovers(destination)
    require_destination(destination, [Path(entry.path) for entry in plan.adapters], force=force)
    members = find_members(plan)
    sources = [directory for member in members.members for directory in (member.source.base_dir, member.source.adapter_dir)]
    require_destination(destination, sources, force=force)
    _require_plain(members.first.base_dir)
    with ExitStack() as stack, sealed_directory(destination) as temporary:
        updates = Updates.open(members.members, stack)
        if isinstance(plan.output, AdapterOutput):
            require_low_rank(updates, plan.output.rank)
        combination = Combination.of(updates, plan, weights_of(plan), progress)
        write = _adapter if isinstance(plan.output, AdapterOutput) else _model
        report = write(combination, members, temporary, destination, progress)
        write_json(temporary / COMBINED, report.as_json())
        write_text(temporary / "README.md", combination_card(report))
    return report


def _require_plain(base_dir: Path) -> None:
    if read_model_config(base_dir).get("quantization_config"):
        raise ConfigError(
            "the base checkpoint is quantized already, and adapters of such a one are not combined",
            where=str(base_dir),
            fix="merge each of them with `finetune merge`, or train on the original model",
        )


def _probe(members: Members) -> Probe:
    probe = Probe.of(members.rows)
    if not probe.compared.any():
        raise DataError("no row has a supervised token, so that the result cannot be verified", fix="give the runs a validation set")
    return probe


# --- a model -------------------------------------------------------------------------------------------------------------------------


def _model(combination: Combination, members: Members, temporary: Path, destination: Path, progress: Progress) -> CombineReport:
    output = combination.plan.output
    assert isinstance(output, ModelOutput)
    fits = fits_in_memory(combination)
    if not fits and output.dtype == "auto":
        raise ConfigError(
            "the model is too large for this machine's memory to measure what a type keeps",
            where="output.dtype",
            fix="state the type: `output: {kind: model, dtype: bf16}`; rows of every weight are compared with the exact ones",
        )
    probe = _probe(members)
    dense = dense_model(combination, probe, progress) if fits else None
    proof = _Proof(sampled_rows(combination), dense.exact if dense else None, dense.loss_base if dense else math.nan, probe, members.first)
    del dense  # it and the model in the fresh process would fill the memory together
    _free()
    trials: list[Trial] = []
    for candidate in candidates(output.dtype, "nearest", 0, every=False):
        shutil.rmtree(temporary)
        temporary.mkdir()
        trial, written, loss = _try(combination, temporary, members, proof, candidate, progress)
        trials.append(trial)
        if trial.accepted:
            return CombineReport(
                destination, combination.plan, describe(combination.plan, combination.weights), members, tuple(trials), loss, written, None
            )
    raise _refused(trials, "written as")


def _try(
    combination: Combination, temporary: Path, members: Members, proof: _Proof, candidate: Candidate, progress: Progress
) -> tuple[Trial, ModelReport | None, Loss | None]:
    """Write the model in one type and compare it."""
    name, dtype = candidate.dtype, DTYPES[candidate.dtype]
    try:
        written = write_model(combination, temporary, dtype, members.tokenizer_dir, progress)
    except DoesNotFitError as error:
        return Trial(name, "nearest", False, error.problems[0].what, None, None), None, None
    try:
        identity = require_rows(proof.rows, temporary)
    except VerificationError as error:
        what = error.problems[0].what.replace("the adapter model's weight", "the exact combination")
        return Trial(name, "nearest", False, what, None, None), None, None
    found = measure_in_fresh_process(temporary, proof.probe, proof.source.device)
    if proof.dense is None:
        refusal = None if math.isfinite(found.loss) else "its loss is not finite"
        reason = refusal or f"rows of every weight agree (relative error {identity:.1g}); too large to be compared in memory"
        return Trial(name, "nearest", refusal is None, reason, None, identity), written, None
    parity = compare(proof.dense, found, proof.loss_base)
    refusal = _refusal(parity, kl_limit(dtype, torch.float32, "none"), automatic=_is_automatic(combination.plan) and name != "fp32")
    loss = Loss(members.measured_on, proof.loss_base, parity.loss_adapter, parity.loss_merged)
    return Trial(name, "nearest", refusal is None, refusal or _acceptance(parity, name), parity, identity), written, loss


def _is_automatic(plan: Plan) -> bool:
    return isinstance(plan.output, ModelOutput) and plan.output.dtype == "auto"


def _refusal(parity: Parity, limit: float, *, automatic: bool) -> str | None:
    """Why what was written is not good enough; None where it is."""
    found = parity.violations(limit)
    if found:
        return "; ".join(problem.what.replace("the adapter model", "the exact combination") for problem in found)
    if automatic and parity.gain_kept is not None and parity.gain_kept < GAIN_TO_KEEP:
        return f"it keeps {parity.gain_kept:.1%} of what the combination gains, less than {GAIN_TO_KEEP:.0%}"
    return None


def _acceptance(parity: Parity, name: str) -> str:
    if parity.gain_kept is None:
        return f"{name} agrees with the exact combination (KL {parity.mean_kl:.2g}), which gains nothing on these rows"
    return f"{name} keeps {parity.gain_kept:.1%} of what the combination gains"


# --- an adapter ----------------------------------------------------------------------------------------------------------------------


def _adapter(combination: Combination, members: Members, temporary: Path, destination: Path, progress: Progress) -> CombineReport:
    output = combination.plan.output
    assert isinstance(output, AdapterOutput)
    base_name = public_name(members.base_id)
    if not fits_in_memory(combination):
        raise ConfigError(
            "the model is too large for this machine's memory to prove an adapter of it",
            where="output.kind",
            fix="write a model: `output: {kind: model, dtype: bf16}`, or use a machine with more memory",
        )
    written = write_adapter(combination, temporary, output.rank, base_name, progress)
    copy_adapter_companions(combination, members.tokenizer_dir, temporary)
    dense = dense_model(combination, _probe(members), progress)
    exact, loss_base, probe = dense.exact, dense.loss_base, dense.probe
    cut_off = _cut_off(dense, combination, temporary)
    del dense
    _free()
    source = members.first
    measured = measured_by("finetune.merging.adapter_reload", temporary, _loading(source), probe, source.device)
    parity = compare(cut_off, measured, loss_base)
    computed, method = _base_type(source), "none" if source.base == "original" else source.quantization.method
    refusal = _refusal(parity, kl_limit(torch.float32, computed, method), automatic=False)
    kind = str(computed).removeprefix("torch.")
    reason = refusal or f"rank {output.rank} leaves a relative error of {written.error:.2g}; PEFT, in {kind}, computes what was written"
    trial = Trial("fp32", "nearest", refusal is None, reason, parity, None)
    if refusal:
        raise _refused([trial], "written as an adapter in")
    loss = Loss(members.measured_on, loss_base, exact.loss, parity.loss_merged)
    formula = describe(combination.plan, combination.weights)
    return CombineReport(destination, combination.plan, formula, members, (trial,), loss, None, written)


def _cut_off(dense: Dense, combination: Combination, directory: Path) -> Measurement:
    """What the base with the written factors computes, in memory."""
    return dense.with_weights(weights_from(factors_in(directory, combination), combination))


def _base_type(source: MergeSource) -> torch.dtype:
    """What the base of an adapter is loaded in."""
    return torch.float32 if source.base == "original" else source.compute_dtype


def _loading(source: MergeSource) -> tuple[str, str, str]:
    """How the fresh process loads the base: directory, type, bitsandbytes' settings."""
    on_quantized = source.base == "dequantized" and not isinstance(source.quantization, NoQuantization)
    settings = bnb_config(source.quantization, source.compute_dtype) if on_quantized else None
    dtype = str(_base_type(source)).removeprefix("torch.")
    return str(source.base_dir), dtype, json.dumps(settings.to_dict() if settings else None)


def _refused(trials: list[Trial], how: str) -> VerificationError:
    return VerificationError.from_problems(
        Problem(f"{how} {trial.dtype}: {trial.reason}", "the combination", "nothing was written; choose another output.dtype")
        for trial in trials
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
