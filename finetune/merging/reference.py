"""The other side of every comparison: what the live adapter model computes, and the model before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from finetune.errors import DataError
from finetune.merging.identity import LiveRows, live_rows
from finetune.merging.inputs import MergeSource
from finetune.merging.reload import Example, Measurement, Probe, measure
from finetune.merging.verify import device_of
from finetune.model.start import before_training


@dataclass(frozen=True, slots=True)
class Reference:
    """The adapter model's side of the comparison."""

    device: str
    probe: Probe
    trained: Measurement
    loss_base: float
    """Mean loss of the model before its first step, nats a supervised token"""
    rows: tuple[LiveRows, ...]
    """Of every weight that the adapter changes, for a merge onto the base it was trained on."""
    general: Probe | None = None
    """General text, where bases are to be compared."""
    general_trained: float | None = None
    """The adapter model's loss on it, nats a token"""


def probe_of(rows: Sequence[Example]) -> Probe:
    """The probe of ``rows``; DataError where no row has a supervised token."""
    probe = Probe.of(rows)
    if not probe.compared.any():
        raise DataError("no row has a supervised token, so that the merge cannot be verified", fix="give the run a validation set")
    return probe


def reference_of(model: Any, source: MergeSource, probe: Probe, general: Probe | None = None) -> Reference:
    """Measure ``model``, the live PEFT model that ``source`` was trained as, with its adapter and as it was before training.

    What is returned holds no part of the model, which may be gone before its merge is loaded.
    """
    device = device_of(model)
    with _computing(model, source, device):
        trained = measure(model, probe, device)
        general_trained = measure(model, general, device).loss if general else None
    with _computing(model, source, device), before_training(model, source.adapter_dir, loftq=source.loftq):
        loss_base = measure(model, probe, device).loss
    rows = live_rows(model, source.compute_dtype) if source.base == "dequantized" else ()
    return Reference(device, probe, trained, loss_base, rows, general, general_trained)


def _computing(model: Any, source: MergeSource, device: str) -> AbstractContextManager[object]:
    """How ``model`` runs: in the autocast of training where types are mixed that no product takes both of.

    Those are whole copies of modules in another type than the base, and bf16 factors: most layers of PEFT cast for themselves, and AdaLoRA
    on int8 casts its input alone. fp32 has no autocast.
    """
    dtype = source.compute_dtype
    mixed = any(".modules_to_save." in name and parameter.dtype != dtype for name, parameter in model.named_parameters())
    narrow = dtype != torch.float32 and source.adapter_dtype != torch.float32
    return torch.autocast(torch.device(device).type, dtype) if mixed or narrow else nullcontext()
