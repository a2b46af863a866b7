"""`finetune analyze MODEL --spectrum`: the signal-to-noise ratio of every linear layer, and which would be chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from finetune.analysis.checks import require_share
from finetune.analysis.plot import Line, LinePanel
from finetune.model.builtin import resolve_model
from finetune.model.spectrum import ModuleSpectrum, spectra
from finetune.planning.targets import chosen, kind_of, layer_of, ranked


@dataclass(frozen=True, slots=True)
class SignalReport:
    """Spectra of a model's linear modules."""

    model: str
    share: float
    """Share of the layers of each type that counts as chosen."""
    modules: dict[str, ModuleSpectrum]
    """By name, in the model's order."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """What `targets: {spectrum: share}` would take."""
        return tuple(chosen(self._ratios, self.share))

    @property
    def ranked(self) -> dict[str, list[str]]:
        """Module names by type, the highest ratio first."""
        return ranked(self._ratios)

    @property
    def undecided(self) -> tuple[str, ...]:
        """Modules whose ratio is infinite: nothing lies at or below the edge, so they cannot be told apart."""
        return tuple(name for name, ratio in self._ratios.items() if math.isinf(ratio))

    @property
    def _ratios(self) -> dict[str, float]:
        return {name: module.ratio for name, module in self.modules.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a ratio that is infinite is null."""
        places = {name: place for names in self.ranked.values() for place, name in enumerate(names, start=1)}
        taken = set(self.chosen)
        rows = [
            {
                "module": name,
                "kind": kind_of(name),
                "layer": layer_of(name),
                "ratio": found.ratio if math.isfinite(found.ratio) else None,
                "place": places[name],
                "chosen": name in taken,
                **asdict(found),
            }
            for name, found in self.modules.items()
        ]
        return {"model": self.model, "share": self.share, "modules": rows}

    @property
    def title(self) -> str:
        """Of the plot."""
        return f"Signal-to-noise ratio of the linear layers of {self.model}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the figures mean, and where they mean nothing."""
        usual = "Spectrum (2406.06623): singular values above the Marchenko-Pastur edge over those below, over the largest; logarithmic"
        if not self.undecided:
            return (usual,)
        names = f"{self.undecided[0]}{f' and {len(self.undecided) - 1} more' if len(self.undecided) > 1 else ''}"
        return usual, f"no singular value below the edge, so that the ratio is infinite and says nothing: {names}"

    def panels(self) -> list[LinePanel]:
        """A panel for each type of module: ratio over layers."""
        kinds: dict[str, list[tuple[float, float]]] = {}
        for name, found in self.modules.items():
            kinds.setdefault(kind_of(name), []).append((float(layer_of(name) or 0), found.ratio))
        return [LinePanel(kind, (Line("ratio", tuple(points)),), logarithmic=True) for kind, points in kinds.items()]


def measure_signal(
    model_id: str, share: float, revision: str | None = None, progress: Callable[[int, int], None] = lambda *_: None
) -> SignalReport:
    """The report of a hub id, directory or builtin model; ConfigError where there is none or ``share`` is not in (0, 1]."""
    require_share(share)
    return SignalReport(model_id, share, spectra(resolve_model(model_id, revision), progress))
