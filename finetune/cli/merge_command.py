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


def merge(  # noqa: PLR0913 - one parameter an option
    run: RunPath,
    output: Annotated[Path, typer.Option("-O", "--output", metavar="DIR", help="Directory to write; must be new or empty.")],
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="What is written: merged weights, a model quantized again to NF4, or a plain LoRA for serving engines. gguf: says how.",
        ),
    ] = "safetensors",
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="With --to adapter, of what must be approximated (DoRA, IA3). Default: what keeps 99 %."),
    ] = None,
    base: Annotated[
        Literal["dequantized", "original"],
        typer.Option("--base", help="What the adapter is added to: the base it was trained on, or the unquantized original."),
    ] = "dequantized",
    compare_bases: Annotated[
        bool, typer.Option("--compare-bases", help="Measure the merge onto the other base too, on validation rows and general text.")
    ] = False,
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        typer.Option("--dtype", help="Type of the weights. auto: the smallest that keeps 99 % of what was learned."),
    ] = "auto",
    rounding: Annotated[
        Literal["nearest", "stochastic"],
        typer.Option("--rounding", help="How values between two of the type's are written. stochastic: by chance, right on average."),
    ] = "nearest",
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of stochastic rounding. Default: 0.")] = None,
    compare_dtypes: Annotated[
        bool, typer.Option("--compare-dtypes", help="Write and measure every type and rounding, not only up to the one that is kept.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier merge in DIR.")] = False,
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
    if rank is not None:
        raise ConfigError("--rank has no meaning with --to safetensors", where="--rank", fix="leave it out")
    if seed is not None and rounding == "nearest" and not compare_dtypes:
        raise ConfigError("--seed has no meaning where nothing is drawn", where="--seed", fix="leave it out, or add --rounding stochastic")
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
    if as_json:
        sys.stdout.write(json.dumps({"destination": str(output), **done.as_json()}, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(f"{output}\n")


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
