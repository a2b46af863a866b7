"""`finetune merge --to nf4|adapter|gguf`: what is refused, and what is said about the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune import api
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.merging.exports import ExportReport

Form = Literal["safetensors", "nf4", "adapter", "gguf"]


def meant(to: Form, run: Path, output: Path, others: Mapping[str, object]) -> Literal["nf4", "adapter"]:
    """What to export. ConfigError for GGUF, which another program writes, and for options of ``others`` that ``to`` has no use for."""
    if to not in ("nf4", "adapter"):
        raise ConfigError(
            "GGUF is written by llama.cpp's own converter, which no package index carries in a form that can be depended on",
            where="--to gguf",
            fix=f"merge, then convert: `finetune merge {run} -O {output}`, and from a checkout of llama.cpp "
            f"`python convert_hf_to_gguf.py {output} --outfile {output}.gguf --outtype bf16`",
        )
    given = [name for name, value in others.items() if value]
    if given:
        raise ConfigError(f"{given[0]} has no meaning with --to {to}", where=given[0], fix="leave it out")
    return to


def show(report: ExportReport, *, as_json: bool) -> None:
    """What was written and what it cost, on stderr; the directory, or everything as JSON, on stdout."""
    from finetune.cli.view import note

    parity = report.parity
    for trial in report.trials:
        note(f"{'wrote' if trial is report.chosen else 'tried'} {report.kind}, {trial.name}: {trial.reason}")
    note(f"  {report.chosen.size / 2**20:.1f} MiB")
    note(
        f"verified by loading it in a fresh process, on {parity.positions:,} positions: largest logit difference "
        f"{parity.max_logit_difference:.3g}, mean KL {parity.mean_kl:.2g}, same arg-max {parity.argmax_agreement:.2%}, "
        f"loss {parity.loss_base:.4f} before training, {parity.loss_adapter:.4f} as trained, {parity.loss_merged:.4f} as exported"
    )
    if parity.is_few:
        note(f"  {parity.positions} positions are few: the shares above are noise")
    if as_json:
        sys.stdout.write(json.dumps({"destination": str(report.destination), **report.as_json()}, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(f"{report.destination}\n")


def export(
    run: Path,
    output: Path,
    to: Literal["nf4", "adapter"],
    base: Literal["dequantized", "original"],
    settings: api.ExportSettings,
) -> ExportReport:
    """Run the export under a counter."""
    from finetune.cli import view

    with view.counting("exporting"):
        return api.export(run, output, to, base=base, **settings)
