"""Spectrum (2406.06623): which linear layers carry the most signal, from the singular values of their weights alone.

For each weight W (d_out, d_in) with singular values s_1 >= ... >= s_n, n = min(d_out, d_in), beta = n / max(d_out, d_in):

    sigma = (q75 - q25) / 1.349        noise level from the interquartile range of the s_i; 1.349 is that range of a standard normal
    e     = sigma (1 + sqrt(beta))     the Marchenko-Pastur edge, as the paper has it without the factor sqrt(max(d_out, d_in))
    ratio = sum(s_i > e) / sum(s_i <= e) / s_1

Layers are ranked by their ratio within each type of module (all q_proj, all k_proj, ...), and the top share is trained. Quartiles are
interpolated linearly. A weight with no singular value at or below e has an infinite ratio, which happens where the spectrum is narrow (an
untrained matrix with one side much longer than the other); such weights rank first, in the model's order. A weight of zeros has ratio 0.

Limits, measured on planted matrices: the ratio falls as 1/c when W is multiplied by c, and at one noise level a few strong directions lower
it, since it is divided by the largest of them. Among weights of one norm those with many directions above their noise rank first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.cache import cached
from finetune.config.schema import Section, SpectrumTargets
from finetune.errors import ConfigError, VerificationError
from finetune.model.builtin import fingerprint
from finetune.model.targets import linear_modules
from finetune.model.weights import Weights
from finetune.sealed import read_json, write_json

VERSION = 1
"""Raise it whenever `measure` changes: it is a part of the cache's key."""

_FILE = "spectrum.json"
_IQR_OF_NORMAL = 1.349


@dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """What the singular values of one weight say; sums are over singular values."""

    shape: tuple[int, int]
    """(d_out, d_in)"""
    largest: float
    """s_1"""
    edge: float
    """e"""
    above: float
    """Sum of the singular values above e."""
    below: float
    """Sum of those at or below e."""
    signals: int
    """Number of singular values above e."""

    @property
    def ratio(self) -> float:
        """Signal over noise over the largest singular value; infinite where nothing lies at or below the edge."""
        if not self.largest:
            return 0.0
        return self.above / self.below / self.largest if self.below else math.inf


def measure(weight: Tensor) -> ModuleSpectrum:
    """The spectrum of ``weight`` (d_out, d_in), finite, in fp32 on its device."""
    values = torch.linalg.svdvals(weight.float()).double()
    low, high = (float(quartile) for quartile in values.quantile(values.new_tensor([0.25, 0.75])))
    beta = min(weight.shape) / max(weight.shape)
    edge = (high - low) / _IQR_OF_NORMAL * (1.0 + math.sqrt(beta))
    is_signal = values > edge
    return ModuleSpectrum(
        shape=(weight.shape[0], weight.shape[1]),
        largest=float(values[0]),
        edge=edge,
        above=float(values[is_signal].sum()),
        below=float(values[~is_signal].sum()),
        signals=int(is_signal.sum()),
    )


def spectra(base_dir: Path, progress: Callable[[int, int], None] = lambda *_: None) -> dict[str, ModuleSpectrum]:
    """The spectrum of every linear module of the model in ``base_dir`` by name, in the model's order.

    The weights on disk are measured, one in memory at a time, on the GPU where there is one: a quantized run gets the spectrum of the
    original. Kept in the cache under the fingerprint of the base. ``progress`` is called with (done, of) while it is made. ConfigError
    where transformers cannot build the model, VerificationError where a weight is missing or damaged.
    """

    def make(directory: Path) -> None:
        write_json(directory / _FILE, {name: asdict(found) for name, found in _measured(base_dir, progress).items()})

    stored = read_json(cached("spectrum", f"{fingerprint(base_dir)}-v{VERSION}", make) / _FILE)
    return {name: ModuleSpectrum(**{**found, "shape": tuple(found["shape"])}) for name, found in stored.items()}


def _measured(base_dir: Path, progress: Callable[[int, int], None]) -> dict[str, ModuleSpectrum]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = _linear_names(base_dir)
    found = {}
    with Weights.of_model(base_dir) as weights:
        for done, name in enumerate(names, start=1):
            weight = weights.read(f"{name}.weight").to(device)
            if not weight.isfinite().all():
                raise VerificationError(f"{name}.weight holds NaN or infinity", where=str(base_dir), fix="download the model again")
            found[name] = measure(weight)
            progress(done, len(names))
    return found


def _linear_names(base_dir: Path) -> list[str]:
    """Linear modules of the model in ``base_dir`` but the output head; built on the meta device, without weights."""
    try:
        config = AutoConfig.from_pretrained(base_dir, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"cannot build the model: {error}", where=str(base_dir), fix="use a causal language model that transformers knows"
        ) from error
    names = linear_modules(model)
    if not names:
        raise ConfigError(
            f"{type(model).__name__} has no linear modules with a weight of their own", where=str(base_dir), fix="use another model"
        )
    return names


def ratios(base_dir: Path, names: Iterable[str]) -> dict[str, float]:
    """The ratio of each of ``names``, linear modules of the model in ``base_dir``; VerificationError for a name it has not."""
    found = spectra(base_dir)
    missing = sorted(set(names := list(names)) - set(found))
    if missing:
        raise VerificationError(
            f"the base has no linear module {missing[0]}", where=str(base_dir), fix="check that model.id is the model that was loaded"
        )
    return {name: found[name].ratio for name in names}


def ratios_for(tuning: Section, base_dir: Path) -> dict[str, float] | None:
    """The ratios of all linear modules where ``tuning`` chooses its targets by Spectrum; None where it does not."""
    if not isinstance(getattr(tuning, "targets", None), SpectrumTargets):
        return None
    return {name: found.ratio for name, found in spectra(base_dir).items()}
