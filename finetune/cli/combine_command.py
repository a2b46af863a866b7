"""`finetune combine`: several adapters of one base as one model or one adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import api
from finetune.cli.options import Json

if TYPE_CHECKING:
    from finetune.merging.combine_report import CombineReport


def combine(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="YAML file: the method, the adapters with their weights, the output.")],
    output: Annotated[Path, typer.Option("-O", "--output", metavar="DIR", help="Directory to write; must be new or empty.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result of `combine` or `merge` in DIR.")] = False,
    as_json: Json = False,
) -> None:
    """Combine adapters of one base as PLAN says into DIR, a model or an adapter; prints DIR last.

    Methods: average, task-arithmetic, ties, magnitude-prune, dare-linear, dare-ties, all on whole updates. See docs/combine.md.
    DIR is loaded in a fresh process and compared with the exact combination.
    Where they differ, nothing is written and the exit code is 6.
    """
    from finetune.cli import view

    with view.counting("combining") as advance:
        done = api.combine(plan, output, force=force, progress=advance)
    _show(done)
    if as_json:
        sys.stdout.write(json.dumps({"destination": str(output), **done.as_json()}, indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write(f"{output}\n")


def _show(done: CombineReport) -> None:
    """What was written and how good it is, on stderr."""
    from finetune.cli import view

    for note in done.notes:
        view.note(f"note: {note}")
    weights = "dequantized" if done.on_quantized else "stored"
    view.path(f"{done.formula}, on the {weights} weights of {done.members.base_id}")
    for trial in done.trials:
        view.note(f"  {'wrote' if trial.accepted else 'tried'} {trial.dtype}: {trial.reason}")
    if done.adapter:
        errors = ", ".join(f"{kind} {error:.2g}" for kind, error in done.adapter.errors.items())
        view.note(f"  relative error of rank {done.adapter.rank}: {done.adapter.error:.3g} in all ({errors})")
        if done.adapter.padded:
            view.note(
                f"  {done.adapter.padded} of {done.adapter.modules} modules are narrower than that: the rest of their factors is zero"
            )
    if done.model and done.model.untied:
        view.note("  the head is no longer tied to the embeddings")
    _show_proof(done)


def _show_proof(done: CombineReport) -> None:
    """How near what was written is to the exact combination."""
    from finetune.cli import view

    parity = done.trials[-1].parity
    if parity:
        view.note(
            f"verified by loading it in a fresh process, on {parity.positions:,} positions: largest logit difference "
            f"{parity.max_logit_difference:.3g}, mean KL {parity.mean_kl:.2g}, same arg-max {parity.argmax_agreement:.2%}"
        )
        if parity.is_few:
            view.note(f"  {parity.positions} positions are few: the shares above are noise")
    if done.loss:
        loss = done.loss
        view.note(
            f"loss on {loss.measured_on}, nats a token: base {loss.base:.4f}, exact combination {loss.combined:.4f}, "
            f"as written {loss.written:.4f}"
        )
