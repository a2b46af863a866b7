"""`finetune analyze RUN...`: what training did to each weight, and how alike two runs are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.analysis.checks import require_analyzable
from finetune.analysis.plot import GridPanel, Line, LinePanel, Panel
from finetune.analysis.runs import KEPT_OF_WHOLE, Changed, Trained, changes, open_trained
from finetune.analysis.similarity import Of, Similarity, compare
from finetune.analysis.update_spectra import Directions, amplification, directions, effective_rank
from finetune.config.schema import Config, EvaInit, Full, Lora
from finetune.errors import VerificationError
from finetune.planning.targets import kind_of, layer_of
from finetune.runs import RunDirectory

_SHOWN_VALUES = 16
"""Largest singular values that are reported."""
_COMPARED_DIRECTIONS = 64
"""Directions kept in memory for the comparison of runs."""

Bases = dict[tuple[str, Of], Tensor]
"""Orthonormal bases (d_in, k) fp64 by module and matrix."""


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """What training did to one weight W (d_out, d_in); norms are Frobenius norms."""

    module: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    rank: int
    """Directions that could train, and over which the amplification is taken."""
    rank_bound: int
    """Largest rank that the update can have: `rank`, or twice that where a start B0 A0 other than zero is taken away."""
    effective_rank: float
    """exp of the entropy of the normalized singular values; between 1 and `rank_bound`."""
    singular_values: tuple[float, ...]
    """The largest ones of the update, falling."""
    norm: float
    """||delta||"""
    relative_norm: float
    """||delta|| / ||W||"""
    amplification: float | None
    """||delta|| / ||U^T W V||: against what W had in the update's directions; None for an update of zeros."""
    captured: float
    """Share of ||delta||^2 in the directions that were computed; 1 for an adapter."""
    magnitude_change: float | None
    """DoRA: mean |m / m0 - 1| of the magnitudes over rows; else None."""


@dataclass(frozen=True, slots=True)
class RunAnalysis:
    """One run."""

    run: str
    method: str
    measured: str
    """What the update is, as a formula."""
    notes: tuple[str, ...]
    modules: tuple[ModuleUpdate, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs side by side."""

    first: str
    second: str
    similarities: tuple[Similarity, ...]
    same_start: bool = False
    """Whether both drew the same A: one method, rank, start and seed."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything `finetune analyze RUN...` found."""

    runs: tuple[RunAnalysis, ...]
    pairs: tuple[Pair, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def title(self) -> str:
        """Of the plot."""
        return f"What training changed: {', '.join(_labels(self.runs).values())}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What every figure means, and what is particular to a run."""
        pairs = ("phi(i, j): 0 where the directions are orthogonal, 1 where one space lies in the other",) if self.pairs else ()
        labels = _labels(self.runs)
        return (*(f"{labels[run.run]} ({run.measured}): {note}" for run in self.runs for note in run.notes), *pairs)

    def panels(self) -> list[Panel]:
        """Figures over the layers, a panel for each type of module; then similarities."""
        return [*_figure_panels(self.runs), *_similarity_panels(self.pairs, _labels(self.runs))]


def analyze(runs: Sequence[tuple[RunDirectory, Config]], progress: Callable[[str, int], None] = lambda *_: None) -> Analysis:
    """Analyze finished ``runs`` and compare each pair; ``progress`` is called with (run, modules done since).

    Errors are those of `require_analyzable`, and VerificationError: a base is not the one a run was trained on, or two runs share no
    module of one shape.
    """
    require_analyzable(runs)
    opened = [open_trained(run, config) for run, config in runs]
    found, bases = [], []
    for trained in opened:
        kept: Bases = {}
        found.append(_analyzed(trained, kept if len(opened) > 1 else None, progress))
        bases.append(kept)
    pairs = [
        replace(_pair(found[i].run, found[j].run, bases[i], bases[j]), same_start=_same_start(opened[i].config, opened[j].config))
        for i, j in combinations(range(len(found)), 2)
    ]
    return Analysis(tuple(found), tuple(pairs))


def _analyzed(trained: Trained, bases: Bases | None, progress: Callable[[str, int], None]) -> RunAnalysis:
    skipped: list[str] = []
    modules = []
    for change in changes(trained, skipped):
        found = directions(change.update.left, change.update.right)
        modules.append(_module(change, found))
        if bases is not None:
            _keep(bases, change, found)
        progress(str(trained.run.path), 1)
    if not modules:
        raise VerificationError("no matrix of the model was changed", where=str(trained.directory), fix="train again")
    tuning = trained.config.tuning
    return RunAnalysis(
        str(trained.run.path), tuning.method, trained.measured, (*_notes(trained), *skipped), tuple(sorted(modules, key=_place))
    )


def _place(module: ModuleUpdate | Similarity) -> tuple[bool, int, str]:
    """Layers by number, then by name; what is in no layer (embeddings) last."""
    return module.layer is None, module.layer or 0, module.module


def _notes(trained: Trained) -> list[str]:
    notes = []
    tuning = trained.config.tuning
    if trained.loftq or trained.exported:
        notes.append("the adapter did not begin at zero: the update is measured from its start B0 A0")
    if isinstance(tuning, Lora) and tuning.dora:
        notes.append("DoRA: the update is s BA, the change of direction before rows are scaled; the magnitudes are told apart")
    if isinstance(tuning, Full):
        notes.append(f"singular values, effective rank and amplification are of the {KEPT_OF_WHOLE} largest directions of each update")
    if trained.config.quantization.method != "none":
        notes.append(f"W is the base as it was dequantized from {trained.config.quantization.method}")
    return notes


def _module(change: Changed, found: Directions) -> ModuleUpdate:
    update, weight = change.update, change.weight
    norm = found.norm if update.norm is None else update.norm
    whole = float(weight.norm())
    return ModuleUpdate(
        module=update.module,
        kind=kind_of(update.module),
        layer=layer_of(update.module),
        shape=(weight.shape[0], weight.shape[1]),
        rank=update.rank,
        rank_bound=min(update.left.shape[1], *weight.shape),
        effective_rank=effective_rank(found.sigma),
        singular_values=tuple(found.sigma[:_SHOWN_VALUES].tolist()),
        norm=norm,
        relative_norm=norm / whole if whole else 0.0,
        amplification=amplification(norm, weight, found, update.rank),
        captured=min(1.0, (found.norm / norm) ** 2) if norm else 1.0,
        magnitude_change=_magnitude_change(change),
    )


def _magnitude_change(change: Changed) -> float | None:
    """Mean |m / m0 - 1|, m0 the norms that DoRA's magnitudes began as: of rows, and of columns of an embedding."""
    magnitude = change.update.magnitude
    if magnitude is None:
        return None
    norms = torch.linalg.vector_norm(change.start, dim=0 if change.update.embedding else 1)
    return float((magnitude.flatten() / norms - 1.0).abs().mean())


def _keep(bases: Bases, change: Changed, found: Directions) -> None:
    update = change.update
    bases[update.module, "update"] = found.v[:, :_COMPARED_DIRECTIONS]
    if update.a is not None:
        bases[update.module, "A"] = torch.linalg.svd(update.a.double(), full_matrices=False)[2][:_COMPARED_DIRECTIONS].T


def _pair(first: str, second: str, left: Bases, right: Bases) -> Pair:
    shared = [key for key in left if key in right and left[key].shape[0] == right[key].shape[0]]
    compared = (compare(module, of, left[module, of], right[module, of]) for module, of in shared)
    found = tuple(similarity for similarity in compared if similarity is not None)
    if not found:
        raise VerificationError(
            "the two runs changed no module of one name and shape", where=f"{first}, {second}", fix="compare runs of one base model"
        )
    return Pair(first, second, tuple(sorted(found, key=_place)))


def _same_start(first: Config, second: Config) -> bool:
    """Whether A of both runs, of one base, was drawn alike; full tuning has none."""
    left, right = first.tuning, second.tuning
    if isinstance(left, Full) or isinstance(right, Full) or type(left) is not type(right) or first.seed != second.seed:
        return False
    if isinstance(left, Lora) and isinstance(left.init, EvaInit) and first.data != second.data:  # its A comes from the rows
        return False
    return all(getattr(left, key, None) == getattr(right, key, None) for key in ("rank", "init_rank", "rank_pattern", "init", "share"))


# --- plots ---------------------------------------------------------------------------------------------------------------------------


def _labels(runs: Sequence[RunAnalysis]) -> dict[str, str]:
    """The last part of each run's path, or the whole where two end alike."""
    names = [Path(run.run).name for run in runs]
    return {run.run: name if names.count(name) == 1 else run.run for run, name in zip(runs, names, strict=True)}


def _figure_panels(runs: Sequence[RunAnalysis]) -> Iterator[Panel]:
    kinds = sorted({module.kind for run in runs for module in run.modules})
    for kind in kinds:
        yield _over_layers(f"{kind}: |update| / |weight|", runs, kind, lambda module: module.relative_norm)
        yield _over_layers(f"{kind}: effective rank", runs, kind, lambda module: module.effective_rank)
        yield _over_layers(f"{kind}: amplification", runs, kind, lambda module: module.amplification)


def _over_layers(title: str, runs: Sequence[RunAnalysis], kind: str, figure: Callable[[ModuleUpdate], float | None]) -> LinePanel:
    lines, labels = [], _labels(runs)
    for run in runs:
        modules = [module for module in run.modules if module.kind == kind]
        points = [(float(module.layer or 0), value) for module in modules if (value := figure(module)) is not None]
        lines.append(Line(labels[run.run], tuple(points)))
    return LinePanel(title, tuple(lines))


def _similarity_panels(pairs: Sequence[Pair], labels: Mapping[str, str]) -> Iterator[Panel]:
    for pair in pairs:
        groups: dict[tuple[str, Of, tuple[int, ...]], list[Similarity]] = {}
        for similarity in pair.similarities:
            groups.setdefault((similarity.kind, similarity.of, similarity.sizes), []).append(similarity)
        for (kind, of, sizes), found in groups.items():
            cells = torch.tensor([one.phi for one in found]).mean(dim=0).tolist()
            title = f"{kind}, {of}: {labels[pair.first][-16:]} | {labels[pair.second][-16:]}"
            yield GridPanel(title, tuple(map(str, sizes)), tuple(map(tuple, cells)))
