"""`finetune analyze`: what training did to the weights of a run, or which layers of a model carry signal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import api
from finetune.cli.options import Json
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from finetune.analysis.analyze import Analysis, ModuleUpdate, Pair, RunAnalysis
    from finetune.analysis.signal import SignalReport
    from finetune.analysis.similarity import Similarity

_KINDS_ACROSS = 7
"""Columns that fit beside the layer in 80 characters."""


def analyze(
    targets: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run directories; with --spectrum one model: hub id, directory or builtin.")
    ],
    spectrum: Annotated[bool, typer.Option("--spectrum", help="Signal-to-noise ratio of the layers of a model (Spectrum).")] = False,
    share: Annotated[
        float | None, typer.Option("--share", metavar="P", help="With --spectrum: mark the top P of each type of module. Default: 0.5.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer of RUNs, not only means over each type of module.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw into an .svg or .html file.")] = None,
    as_json: Json = False,
) -> None:
    """Show what training did to each weight of finished RUNs: size, effective rank, amplification, and how alike two runs are.

    |dW|/|W|: Frobenius norm of the update over that of the weight (mean, and the layer where it is largest).
    eff. rank: exp of the entropy of the update's singular values, at most the number under `of`; top sv: the largest of them.
    amplif.: |dW| over what W has in the update's directions (2106.09685, section 7.3).
    phi(i): overlap of the first i directions of two runs (2106.09685, section 7.2); chance: that of random ones.

    With --spectrum: which layers of a model carry signal, as `targets: {spectrum: P}` chooses them.
    """
    from finetune.cli import view

    if spectrum:
        _require_one_model(targets, layers)
        with view.counting("measuring") as advance:
            signal = api.spectrum(
                targets[0], share=0.5 if share is None else share, plot=plot, progress=lambda *_: advance("singular values", 1)
            )
        result = signal.as_dict()
    else:
        if share is not None:
            raise ConfigError("--share chooses layers of a model, not of runs", where=f"--share {share:g}", fix="add --spectrum")
        with view.counting("analyzing") as advance:
            analysis = api.analyze([Path(target) for target in targets], plot, advance)
        result = analysis.as_dict()
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, allow_nan=False) + "\n")
    elif spectrum:
        _show_signal(signal)
    else:
        _show_analysis(analysis, layers=layers)
    if plot:
        view.path(f"drawn in {plot}")


def _require_one_model(targets: Sequence[str], layers: bool) -> None:
    if len(targets) > 1:
        raise ConfigError(f"--spectrum measures one model, and {len(targets)} are named", where=targets[1], fix="run it once for each")
    if layers:
        raise ConfigError("--spectrum shows every layer already", where="--layers", fix="leave it out")


def _table(*headings: str, left: int = 1) -> Table:
    """A plain table whose first ``left`` columns are text and whose others are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right")
    return table


# --- runs ----------------------------------------------------------------------------------------------------------------------------


def _show_analysis(analysis: Analysis, *, layers: bool) -> None:
    from finetune.cli import view

    notes: tuple[str, ...] = ()
    for run in analysis.runs:
        _after(notes)
        view.out.print(f"{run.run}: {run.method}, update {run.measured} of {len(run.modules)} matrices", markup=False, style="bold")
        view.out.print(_layers(run.modules) if layers else _summary(run))
        view.out.print()
        notes = run.notes
        for note in notes:
            view.note(note)
    if analysis.pairs:
        _after(notes)
        _show_pairs(analysis.pairs, layers=layers)


def _after(notes: Sequence[str]) -> None:
    """An empty line after ``notes``, which follow the one below a table."""
    from finetune.cli import view

    if notes:
        view.note("")


def _show_pairs(pairs: Sequence[Pair], *, layers: bool) -> None:
    from finetune.cli import view

    for pair in pairs:
        view.out.print(f"phi(i, i) of {pair.first} and {pair.second}", markup=False, style="bold")
        view.out.print(_similarities(pair, layers=layers))
        view.out.print()
    view.note("phi: 0 orthogonal, 1 the same; chance: of random directions")
    for pair in pairs:
        if pair.same_start and any(similarity.of == "A" for similarity in pair.similarities):
            view.path(
                f"{pair.first} and {pair.second} began with the same A (one method, start and seed), which alone makes phi of A large"
            )


def _summary(run: RunAnalysis) -> Table:
    """Means over the layers of each type of module, the one that changed most first."""
    table = _table("module", "layers", "|dW|/|W|", "largest", "in layer", "eff. rank", "of", "top sv", "amplif.")
    kinds: dict[str, list[ModuleUpdate]] = {}
    for module in run.modules:
        kinds.setdefault(module.kind, []).append(module)
    for kind, found in sorted(kinds.items(), key=lambda pair: -_mean(module.relative_norm for module in pair[1])):
        most = max(found, key=lambda module: module.relative_norm)
        table.add_row(
            kind,
            str(len(found)),
            f"{_mean(module.relative_norm for module in found):.4f}",
            f"{most.relative_norm:.4f}",
            "-" if most.layer is None else str(most.layer),
            f"{_mean(module.effective_rank for module in found):.1f}",
            str(max(module.rank_bound for module in found)),
            f"{max(_top(module) for module in found):.3g}",
            _amplified([module.amplification for module in found]),
        )
    return table


def _layers(modules: Iterable[ModuleUpdate]) -> Table:
    table = _table("module", "layer", "|dW|", "|dW|/|W|", "eff. rank", "of", "top sv", "amplif.")
    for module in modules:
        table.add_row(
            module.kind,
            "-" if module.layer is None else str(module.layer),
            f"{module.norm:.3g}",
            f"{module.relative_norm:.4f}",
            f"{module.effective_rank:.1f}",
            str(module.rank_bound),
            f"{_top(module):.3g}",
            _amplified([module.amplification]),
        )
    return table


def _top(module: ModuleUpdate) -> float:
    return module.singular_values[0] if module.singular_values else 0.0


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _amplified(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{_mean(found):.3g}" if found else "-"


def _similarities(pair: Pair, *, layers: bool) -> Table:
    """phi(i, i) for the sizes that every module has; means over the layers of a type, or each layer."""
    sizes = (
        [size for size in pair.similarities[0].sizes if all(size in one.sizes for one in pair.similarities)] if pair.similarities else []
    )
    table = _table("module", "of", "layer" if layers else "layers", *(f"phi({size})" for size in sizes), f"chance({sizes[-1]})", left=2)
    groups: dict[tuple[str, str, int | None], list[Similarity]] = {}
    for one in pair.similarities:
        groups.setdefault((one.kind, one.of, one.layer if layers else None), []).append(one)
    for (kind, of, layer), found in sorted(groups.items(), key=lambda item: item[0][1]):
        where = str(len(found)) if not layers else "-" if layer is None else str(layer)
        cells = (f"{_mean(one.at(size) for one in found):.3f}" for size in sizes)
        table.add_row(kind, of, where, *cells, f"{_mean(one.chance(sizes[-1]) for one in found):.3f}")
    return table


# --- spectrum ------------------------------------------------------------------------------------------------------------------------


def _show_signal(report: SignalReport) -> None:
    from finetune.cli import view

    view.out.print(f"{report.model}: signal-to-noise ratio of {len(report.modules)} linear layers", markup=False, style="bold")
    for table in _signal_tables(report):
        view.out.print(table)
        view.out.print()
    view.note(f"* the top {report.share:.0%} of each type: what `targets: {{spectrum: {report.share:g}}}` would take")
    for note in report.notes[1:]:
        view.note(note)


def _signal_tables(report: SignalReport) -> Iterator[Table]:
    """Layers down, types of module across; where a layer has several of a type (experts), its best."""
    cells: dict[int | None, dict[str, tuple[float, bool]]] = {}
    kinds: list[str] = []
    for row in report.as_dict()["modules"]:
        kind, ratio = row["kind"], math.inf if row["ratio"] is None else row["ratio"]
        here = cells.setdefault(row["layer"], {})
        here[kind] = max(here.get(kind, (0.0, False)), (ratio, row["chosen"]))
        if kind not in kinds:
            kinds.append(kind)
    for start in range(0, len(kinds), _KINDS_ACROSS):
        across = kinds[start : start + _KINDS_ACROSS]
        table = _table("layer", *across, left=0)
        for layer, here in cells.items():
            table.add_row("-" if layer is None else str(layer), *(_cell(here.get(kind)) for kind in across))
        yield table


def _cell(found: tuple[float, bool] | None) -> str:
    return "" if found is None else f"{found[0]:.3f}{'*' if found[1] else ' '}"
