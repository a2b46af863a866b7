"""Whether a merged directory behaves like the adapter model: measured on real rows, after reloading it in a fresh process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from finetune.errors import Problem, VerificationError
from finetune.merging.reload import Measurement, Probe
from finetune.merging.streamed import is_too_large

MIN_GAIN = 1e-3
"""Nats. A smaller difference between the losses before and after training is noise, and no share of it is computed."""

MIN_GAIN_KEPT = 0.5
"""A merge that keeps a smaller share of the gain is refused, whatever type was asked for."""


_FEW = 100


@dataclass(frozen=True, slots=True)
class Parity:
    """A merged model against the adapter model it was made from."""

    positions: int
    """Compared positions."""
    max_logit_difference: float
    mean_kl: float
    """KL(adapter model || merged model), nats a token"""
    argmax_agreement: float
    """Share of positions where both find the same token most likely"""
    loss_base: float
    """Loss before training: the start of the adapter"""
    loss_adapter: float
    loss_merged: float

    @property
    def gain_kept(self) -> float | None:
        """(loss_base - loss_merged) / (loss_base - loss_adapter); None where training gained less than `MIN_GAIN`."""
        gain = self.loss_base - self.loss_adapter
        return (self.loss_base - self.loss_merged) / gain if gain >= MIN_GAIN else None

    @property
    def is_few(self) -> bool:
        """Whether there were so few positions that the shares are noise."""
        return self.positions < _FEW

    def as_json(self) -> dict[str, float | int | None]:
        """All figures for `merge.json`; None for those that are not finite, which JSON cannot hold."""
        figures = {**asdict(self), "gain_kept": self.gain_kept}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}

    def violations(self, kl_limit: float) -> list[Problem]:
        """What makes the merged model another model than the adapter model; NaN does."""
        found = []
        if not self.mean_kl <= kl_limit:
            found.append(Problem(f"mean KL to the adapter model is {self.mean_kl:.2g} nats a token, above {kl_limit:.2g}"))
        if self.gain_kept is not None and not self.gain_kept >= MIN_GAIN_KEPT:
            found.append(Problem(f"the merged model keeps {self.gain_kept:.0%} of what training gained, less than {MIN_GAIN_KEPT:.0%}"))
        return found


def kl_limit(dtype: torch.dtype, compute_dtype: torch.dtype, method: str) -> float:
    """Largest mean KL, nats a token, of a right merge in ``dtype`` against an adapter model computing in ``compute_dtype``.

    ``method`` is that of the base's quantization. Set from SmolLM2-135M to a few times the largest value measured: computing in bf16 or
    rounding weights to it 0.014, weights in fp16 4e-5, fp32 3e-11; int8 0.09, since its adapter model rounds activations to 8 bits and no
    merged model does. The weights themselves are compared in `identity`, to far tighter limits: this one notices what only a reloaded
    model shows.
    """
    if method == "int8":
        return 0.3
    if torch.bfloat16 in (dtype, compute_dtype):
        return 0.05
    return 1e-3 if dtype == torch.float16 else 1e-5


def compare(adapter: Measurement, merged: Measurement, loss_base: float) -> Parity:
    """The parity of two measurements of the same probe."""
    if adapter.logits.shape != merged.logits.shape:
        raise VerificationError(
            f"the merged model's logits have the shape {tuple(merged.logits.shape)}, the adapter model's {tuple(adapter.logits.shape)}",
            fix="check that the base model is the one the adapter was made for",
        )
    agreement = (adapter.logits.argmax(-1) == merged.logits.argmax(-1)).double().mean()
    return Parity(
        positions=len(adapter.logits),
        max_logit_difference=float((adapter.logits - merged.logits).abs().max()),
        mean_kl=_mean_kl(adapter.logits, merged.logits),
        argmax_agreement=float(agreement),
        loss_base=loss_base,
        loss_adapter=adapter.loss,
        loss_merged=merged.loss,
    )


def _mean_kl(left: Tensor, right: Tensor) -> float:
    """Mean over rows of KL(softmax(left) || softmax(right)), in double precision, since it is a small difference of large sums."""
    total = 0.0
    for p, q in zip(torch.split(left, 32), torch.split(right, 32), strict=True):
        log_p, log_q = functional.log_softmax(p.double(), -1), functional.log_softmax(q.double(), -1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(left)


def measure_in_fresh_process(directory: Path, probe: Probe, device: str = "cpu") -> Measurement:
    """Load ``directory`` with plain transformers in a new Python process and measure it; VerificationError where it does not load.

    A model that is larger than the free memory of ``device`` is read weight by weight instead of being loaded.
    """
    module = "finetune.merging.streamed" if is_too_large(directory, device) else "finetune.merging.reload"
    return measured_by(module, directory, (), probe, device)


def measured_by(module: str, directory: Path, settings: tuple[str, ...], probe: Probe, device: str) -> Measurement:
    """What `python -m MODULE DIRECTORY PROBE RESULT DEVICE SETTINGS...` measures; VerificationError where it fails."""
    with tempfile.TemporaryDirectory(prefix="finetune-verify-") as folder:
        inputs, outputs = Path(folder, "probe.safetensors"), Path(folder, "result.safetensors")
        probe.save(inputs)
        # -P: the working directory's files must not be taken for modules
        command = [sys.executable, "-P", "-m", module, str(directory), str(inputs), str(outputs), device, *settings]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
        if done.returncode or not outputs.is_file():
            last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
            raise VerificationError(
                f"what was written does not reload (exit {done.returncode})",
                where=str(directory),
                fix="see the reason below; nothing was written to the destination",
                excerpt="\n".join(last),
            )
        found = load_file(outputs)
    return Measurement(found["logits"], float(found["loss"]))


def _environment() -> dict[str, str]:
    """The environment of the process: this package is found as it was here, and nothing is fetched."""
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def device_of(model: Any) -> str:
    """The device of a model's first parameter, as torch names it."""
    return str(next(iter(model.parameters())).device)
