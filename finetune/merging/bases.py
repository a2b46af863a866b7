"""What the merge onto either base is worth: on the validation rows and on general text.

The dequantized base is the model that was evaluated. The original one lacks the noise of quantization and can be the better model, above
all on general text, but nothing that was measured while training is true of it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.errors import VerificationError
from finetune.merging.fold import fold
from finetune.merging.inputs import Base, MergeSource
from finetune.merging.reference import Reference
from finetune.merging.trials import DTYPES, Dtype
from finetune.merging.verify import measure_in_fresh_process


@dataclass(frozen=True, slots=True)
class BaseFigures:
    """One model, in nats a supervised token."""

    model: str
    """`adapter model`, or the base of a merge."""
    validation_loss: float
    general_loss: float
    chosen: bool
    """Whether this is what was written."""


def why_base(base: Base, *, quantized: bool) -> str:
    """Why the update is added to ``base``, in a line for the user."""
    if not quantized:
        return "the base it was trained on, which was not quantized"
    if base == "dequantized":
        return "the base as quantization left it, since the adapter was trained and evaluated on that one"
    return "the original base, as asked: it lacks the noise of quantization, and is not the one that was evaluated"


def compare_bases(merged: Path, scratch: Path, source: MergeSource, reference: Reference, dtype: Dtype) -> tuple[BaseFigures, ...]:
    """The adapter model, the accepted merge in ``merged``, and the merge onto the other base, which is written to ``scratch`` and removed.

    ``reference`` must have been measured on general text.
    """
    if reference.general is None or reference.general_trained is None:
        raise VerificationError("the adapter model was not measured on general text, so that the bases cannot be compared")
    other: Base = "original" if source.base == "dequantized" else "dequantized"
    found = [
        BaseFigures("adapter model", reference.trained.loss, reference.general_trained, False),
        _measured(merged, source.base, reference, chosen=True),
    ]
    fold(replace(source, base=other), scratch, DTYPES[dtype])
    found.append(_measured(scratch, other, reference, chosen=False))
    shutil.rmtree(scratch)
    return tuple(found)


def _measured(directory: Path, base: Base, reference: Reference, *, chosen: bool) -> BaseFigures:
    losses = [measure_in_fresh_process(directory, probe, reference.device).loss for probe in (reference.probe, reference.general) if probe]
    return BaseFigures(base, losses[0], losses[1], chosen)
