"""`finetune merge`: its options, and what is said about the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finetune import api
from finetune.cli import export_command
from finetune.cli.export_command import Form
from finetune.cli.options import Json, RunPath
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.merging.merge import MergeReport


_Output = Annotated[Path, typer.Option("-O", "--output", metavar="DIR", help="Directory to write; must be new or empty.")]
_To = Annotated[
    Form,
    typer.Option(
        "--to",
        help="What is written: merged weights, a model quantized again to NF4, or a plain LoRA for serving engines. gguf: says how.",
    ),
]
_Rank = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="With --to adapter, of what must be approximated (DoRA, IA3). Default: what keeps 99 %."),
]
_Base = Annotated[
    Literal["dequantized", "original"],
    typer.Option("--base", help="What the adapter is added to: the base it was trained on, or the unquantized original."),
]
_CompareBases = Annotated[
    bool, typer.Option("--compare-bases", help="Measure the merge onto the other base too, on validation rows and general text.")
]
_Dtype = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option("--dtype", help="Type of the weights. auto: the smallest that keeps 99 % of what was learned."),
]
_Rounding = Annotated[
    Literal["nearest", "stochastic"],
    typer.Option("--rounding", help="How values between two of the type's are written. stochastic: by chance, right on average."),
]
_Seed = Annotated[int | None, typer.Option("--seed", help="Seed of stochastic rounding. Default: 0.")]
_CompareDtypes = Annotated[
    bool, typer.Option("--compare-dtypes", help="Write and measure every type and rounding, not only up to the one that is kept.")
]
_Force = Annotated[bool, typer.Option("--force", help="Replace an earlier merge in DIR.")]


def merge(  # noqa: PLR0913 - one parameter an option
    run: RunPath,
    output: _Output,
    to: _To = "safetensors",
    rank: _Rank = None,
    base: _Base = "dequantized",
    compare_bases: _CompareBases = False,
    dtype: _Dtype = "auto",
    rounding: _Rounding = "nearest",
    seed: _Seed = None,
    compare_dtypes: _CompareDtypes = False,
    force: _Force = False,
    as_json: Json = False,
) -> None:
    """Fold the adapter of RUN into its base as DIR, which plain transformers loads; prints DIR last.

    DIR is reloaded in a fresh process and compared with the adapter model on validation rows.
    Where they differ, nothing is written and the exit code is 6.
    """
    from finetune.cli import view

    if to != "safetensors":
        merging_only = {"--rounding": rounding != "nearest", "--seed": seed is not None, "--compare-bases": compare_bases}
        kind = export_command.meant(
            to, run, output, merging_only | {"--compare-dtypes": compare_dtypes, "--rank": rank if to != "adapter" else None}
        )
        exported = export_command.export(run, output, kind, base, {"dtype": dtype, "rank": rank, "force": force})
        api.report(run)
        export_command.show(exported, as_json=as_json)
        return
    _refuse_needless(rank, seed, draws=rounding == "stochastic" or compare_dtypes)
    with view.counting("merging") as advance:
        done = api.merge(
            run,
            output,
            base=base,
            dtype=dtype,
            rounding=rounding,
            seed=seed or 0,
            compare_dtypes=compare_dtypes,
            compare_bases=compare_bases,
            force=force,
            progress=lambda *_: advance("tensors", 1),
        )
    api.report(run)
    _show(done)
    result = json.dumps({"destination": str(output), **done.as_json()}, indent=2, ensure_ascii=False) if as_json else str(output)
    sys.stdout.write(f"{result}\n")


def _refuse_needless(rank: int | None, seed: int | None, *, draws: bool) -> None:
    """ConfigError for an option that would be ignored."""
    if rank is not None:
        raise ConfigError("--rank has no meaning with --to safetensors", where="--rank", fix="leave it out")
    if seed is not None and not draws:
        raise ConfigError("--seed has no meaning where nothing is drawn", where="--seed", fix="leave it out, or add --rounding stochastic")


def _show(report: MergeReport) -> None:
    """What was written and how close it is to the adapter model, on stderr."""
    from finetune.cli.view import note

    parity = report.parity
    note(f"merged onto {report.why_base}")
    note(f"  {report.fold.updated} tensors updated, {report.fold.size / 2**20:.0f} MiB in {report.fold.shards} file(s)")
    for trial in report.trials:
        note(f"  {'wrote' if trial is report.chosen else 'tried'} {trial.name}: {trial.reason}")
    note(
        f"verified by reloading, on {parity.positions:,} positions: largest logit difference {parity.max_logit_difference:.3g}, mean KL "
        f"{parity.mean_kl:.2g}, same arg-max {parity.argmax_agreement:.2%}, loss {parity.loss_adapter:.4f} -> {parity.loss_merged:.4f}"
    )
    if parity.is_few:
        note(
            f"  {parity.positions} positions are few: the shares above are noise; each weight was compared with the adapter model's besides"
        )
    _show_bases(report)


def _show_bases(report: MergeReport) -> None:
    """The losses of the merge onto either base, where they were compared."""
    from finetune.cli.view import note

    if not report.bases:
        return
    note("nats a token          validation  general text")
    for figures in report.bases:
        name = figures.model if figures.model == "adapter model" else f"{figures.model} base"
        note(f"  {name:<18}  {figures.validation_loss:>10.4f}  {figures.general_loss:>12.4f}{'  (written)' if figures.chosen else ''}")
