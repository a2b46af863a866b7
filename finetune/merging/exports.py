"""`merge --to nf4` and `merge --to adapter`: the tuned model in other forms than merged weights, each proven like a merge.

The export is written to a temporary sibling, loaded in a fresh process by plain transformers (and PEFT), compared with what the adapter
model computed on validation rows, and only then renamed to its destination. An NF4 export is another model by its nature: what it costs is
stated, and it is refused where it lost more than half of what training gained (docs/adr/0019).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.config.schema import FourBit, NoQuantization
from finetune.errors import ConfigError, Problem, VerificationError
from finetune.merging.companions import copy_tokenizer
from finetune.merging.destination import REPORT, clear_leftovers, require_destination
from finetune.merging.fold import fold
from finetune.merging.identity import require_rows
from finetune.merging.inputs import Base, MergeSource
from finetune.merging.layout import read_layout
from finetune.merging.nf4 import quantize_directory
from finetune.merging.plain_adapter import needed_rank, write_plain
from finetune.merging.reference import Reference, probe_of, reference_of
from finetune.merging.reload import Example
from finetune.merging.trials import DTYPES, GAIN_TO_KEEP, DtypeChoice
from finetune.merging.verify import Parity, compare, kl_limit, measured_by
from finetune.model.packed import stored_quantization
from finetune.model.quantize import bnb_config
from finetune.sealed import sealed_directory, write_json, write_text

Kind = Literal["nf4", "adapter"]
LARGEST_RANK = 512
"""The largest rank that serving engines take (vLLM's --max-lora-rank)."""
_FORMS = "forms"
"""Folder in which every form is written before one is chosen."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What is exported."""

    kind: Kind
    dtype: DtypeChoice = "auto"
    """Of an adapter's factors (`auto`: fp32), or of what an NF4 model does not quantize (`auto`: the run's type of computation)."""
    rank: int | None = None
    """Of an adapter that has to be approximated; None: the smallest power of two times the run's that keeps 99 % of the gain."""
    force: bool = False
    """Whether an earlier merge at the destination may be replaced."""
    card: Callable[[ExportReport], str] | None = None
    """Makes the model card."""


@dataclass(frozen=True, slots=True)
class ExportTrial:
    """One form that was written and measured."""

    name: str
    accepted: bool
    reason: str
    """Why it was accepted or not, in a sentence."""
    parity: Parity
    size: int
    """Bytes of all tensors."""
    details: dict[str, object]
    """How the base is loaded, the rank, the error of the approximation."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and the proof."""

    destination: Path
    kind: Kind
    chosen: ExportTrial
    trials: tuple[ExportTrial, ...]

    @property
    def parity(self) -> Parity:
        """The chosen form's."""
        return self.chosen.parity

    def as_json(self) -> dict[str, object]:
        """The content of `merge.json`."""
        trials = [{**asdict(trial), "parity": trial.parity.as_json()} for trial in self.trials]
        chosen = self.chosen
        return {
            "to": self.kind,
            "form": chosen.name,
            "reason": chosen.reason,
            **chosen.details,
            "size": chosen.size,
            "parity": chosen.parity.as_json(),
            "trials": trials,
        }


def export(model: Any, source: MergeSource, destination: Path, rows: Sequence[Example], options: ExportOptions) -> ExportReport:
    """Write ``source`` into ``destination`` as ``options`` say, verified on ``rows`` against ``model``, as `merge.merge` does."""
    require_destination(destination.absolute(), (source.base_dir, source.adapter_dir), force=options.force)
    return export_measured(reference_of(model, source, probe_of(rows)), source, destination, options)


def export_measured(reference: Reference, source: MergeSource, destination: Path, options: ExportOptions) -> ExportReport:
    """Write ``source`` into ``destination`` as ``options`` say, verified against ``reference``.

    Raises ConfigError where the destination is taken or the adapter has no such form, VerificationError where the result is not good
    enough; the destination is then as it was.
    """
    destination = destination.absolute()
    require_destination(destination, (source.base_dir, source.adapter_dir), force=options.force)
    clear_leftovers(destination)
    write = _nf4 if options.kind == "nf4" else _adapter
    with sealed_directory(destination) as temporary:
        trials = tuple(write(source, reference, temporary, options))
        chosen = _chosen(trials, source)
        _keep(temporary, chosen.name)
        report = ExportReport(destination, options.kind, chosen, trials)
        write_json(temporary / REPORT, report.as_json())
        if options.card:
            write_text(temporary / "README.md", options.card(report))
    return report


def _chosen(trials: Sequence[ExportTrial], source: MergeSource) -> ExportTrial:
    """The accepted form of the smallest loss, or of the smallest KL where losses tell nothing; VerificationError where there is none."""
    accepted = [trial for trial in trials if trial.accepted]
    if accepted:
        return min(accepted, key=lambda trial: trial.parity.mean_kl if trial.parity.gain_kept is None else trial.parity.loss_merged)
    raise VerificationError.from_problems(
        Problem(
            f"exported as {trial.name}: {trial.reason}",
            str(source.adapter_dir),
            "nothing was written; merge instead (`--to safetensors`), or serve the adapter on the base it was trained on (`--to adapter`)",
        )
        for trial in trials
    )


def _keep(temporary: Path, name: str) -> None:
    """Leave only the files of the form ``name``."""
    for path in (temporary / _FORMS / name).iterdir():
        path.rename(temporary / path.name)
    shutil.rmtree(temporary / _FORMS)


# --- NF4 ---------------------------------------------------------------------------------------------------------------------------------


def _nf4(source: MergeSource, reference: Reference, temporary: Path, options: ExportOptions) -> Iterator[ExportTrial]:
    """Quantize the model merged onto each base that the options leave open.

    The dequantized base lies on the grid of NF4, so that updates smaller than half a step of it are rounded away (pitfall A6); the original
    one lies between its points, where the same update moves some weights to the next. Which is better is measured.
    """
    trained = source.quantization
    quantization = FourBit(method="nf4", double_quant=trained.double_quant if isinstance(trained, FourBit) else True)
    dtype = source.compute_dtype if options.dtype == "auto" else DTYPES[options.dtype]
    # of a checkpoint that was quantized before it came here, the original weights are not on this machine
    both = source.base == "dequantized" and not isinstance(trained, NoQuantization) and stored_quantization(source.base_dir) is None
    bases: tuple[Base, ...] = ("dequantized", "original") if both else (source.base,)
    for base in bases:
        yield _quantized(replace(source, base=base), reference, temporary, quantization, dtype)


def _quantized(source: MergeSource, reference: Reference, temporary: Path, quantization: FourBit, dtype: torch.dtype) -> ExportTrial:
    name = "onto the base" if isinstance(source.quantization, NoQuantization) else f"onto the {source.base} base"
    merged, directory = temporary / _FORMS / "merged", temporary / _FORMS / name
    directory.mkdir(parents=True)
    fold(source, merged, dtype)
    if source.base == "dequantized":
        require_rows(reference.rows, merged)
    modules = read_layout(merged, quantization).quantized
    size = quantize_directory(merged, directory, modules, quantization, dtype, source.device)
    for path in merged.iterdir():
        if path.name != "config.json" and not path.name.endswith((".safetensors", ".index.json")):
            path.rename(directory / path.name)
    shutil.rmtree(merged)
    # loaded whatever its size: a 4-bit model is a quarter of the one that was trained, and is not read weight by weight
    measured = measured_by("finetune.merging.reload", directory, (), reference.probe, reference.device)
    parity = compare(reference.trained, measured, reference.loss_base)
    found = parity.violations(float("inf"))
    reason = "; ".join(problem.what for problem in found) or _cost(parity)
    details: dict[str, object] = {"merged_onto": source.base, "modules": len(modules), "quantization": _settings(quantization, dtype)}
    return ExportTrial(name, not found, reason, parity, size, details)


def _settings(quantization: Any, dtype: torch.dtype) -> dict[str, object] | None:
    """bitsandbytes' settings as JSON."""
    config = bnb_config(quantization, dtype)
    return config.to_dict() if config else None


def _cost(parity: Parity) -> str:
    change = f"loss {parity.loss_adapter:.4f} -> {parity.loss_merged:.4f}"
    if parity.gain_kept is None:
        return f"{change}; training gained too little to tell what share is kept"
    return f"{change}, {parity.gain_kept:.1%} of the validation gain is kept"


# --- plain adapter -----------------------------------------------------------------------------------------------------------------------


def _adapter(source: MergeSource, reference: Reference, temporary: Path, options: ExportOptions) -> Iterator[ExportTrial]:
    """Write the adapter, where it must be approximated with more and more ranks until one is good enough."""
    start = needed_rank(source)
    dtype = torch.float32 if options.dtype == "auto" else DTYPES[options.dtype]
    if start is None:
        if options.rank is not None:
            raise ConfigError("this adapter is converted exactly, at its own rank", where="--rank", fix="leave it out")
        yield _plain(source, reference, temporary, options, 0, dtype)
        return
    ranks = [options.rank] if options.rank else [rank for rank in (start << step for step in range(10)) if rank <= LARGEST_RANK]
    for rank in ranks:
        trial = _plain(source, reference, temporary, options, rank, dtype)
        yield trial
        if trial.accepted:
            return


def _plain(
    source: MergeSource, reference: Reference, temporary: Path, options: ExportOptions, rank: int, dtype: torch.dtype
) -> ExportTrial:
    """Write and measure the adapter: converted exactly, or where ``rank`` is not 0, approximated."""
    name = f"rank {rank}" if rank else "converted"
    directory = temporary / _FORMS / name
    directory.mkdir(parents=True)
    written = write_plain(source, directory, rank, dtype)
    copy_tokenizer(source.base_dir, source.adapter_dir, directory)
    on_quantized = source.base == "dequantized" and not isinstance(source.quantization, NoQuantization)
    quantization = _settings(source.quantization, source.compute_dtype) if on_quantized else None
    base_dtype = str(source.compute_dtype).removeprefix("torch.")
    settings = (str(source.base_dir), base_dtype, json.dumps(quantization))
    measured = measured_by("finetune.merging.adapter_reload", directory, settings, reference.probe, reference.device)
    parity = compare(reference.trained, measured, reference.loss_base)
    refusal = _refusal(parity, source, dtype, error=written.error, automatic=options.rank is None)
    details: dict[str, object] = {
        "rank": written.rank,
        "modules": written.modules,
        "error": written.error,
        "base": {"dtype": base_dtype, "quantization": quantization},
    }
    how = f"largest relative error of a module {written.error:.2g}" if written.error else "converted exactly"
    shown = f"rank {written.rank}, {how}, in {str(dtype).removeprefix('torch.')}"
    return ExportTrial(name, refusal is None, f"{shown}: {refusal or _cost(parity)}", parity, written.size, details)


def _refusal(parity: Parity, source: MergeSource, dtype: torch.dtype, *, error: float, automatic: bool) -> str | None:
    """Why an adapter is not good enough; None where it is."""
    computed = torch.bfloat16 if torch.bfloat16 in (source.adapter_dtype, source.compute_dtype, dtype) else source.compute_dtype
    other_base = source.base == "original" and not isinstance(source.quantization, NoQuantization)
    approximated = bool(error) and parity.gain_kept is not None
    limit = float("inf") if other_base or approximated else kl_limit(dtype, computed, source.quantization.method)
    found = parity.violations(limit)
    if found:
        return "; ".join(problem.what for problem in found)
    if error and automatic and parity.gain_kept is not None and parity.gain_kept < GAIN_TO_KEEP:
        return f"it keeps {parity.gain_kept:.1%} of the validation gain, less than {GAIN_TO_KEEP:.0%}"
    return None
