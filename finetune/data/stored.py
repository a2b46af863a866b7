"""Tokenized rows in a file of the run, so that evaluation and merging need neither the data nor the split again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finetune.data.render import Example
from finetune.errors import VerificationError

_PROBE_ROWS = 64


def save_rows(path: Path, train: Sequence[Example], validation: Sequence[Example]) -> None:
    """Write the validation rows, or where there are none the first training rows, by which a merge can still be checked."""
    rows = validation or train[:_PROBE_ROWS]
    tensors = {
        "ids": torch.tensor([token for row in rows for token in row.ids], dtype=torch.int32),
        "mask": torch.tensor([flag for row in rows for flag in row.mask], dtype=torch.uint8),
        "lengths": torch.tensor([len(row.ids) for row in rows], dtype=torch.int32),
    }
    save_file(tensors, path, {"kind": "validation" if validation else "training"})


def load_rows(path: Path) -> tuple[tuple[Example, ...], bool]:
    """The rows, and whether they are validation rows; VerificationError where the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            kind = (file.metadata() or {})["kind"]
            ids, mask = (file.get_tensor(name).tolist() for name in ("ids", "mask"))
            lengths = file.get_tensor("lengths").tolist()
    except (OSError, SafetensorError, KeyError) as error:
        raise VerificationError(f"cannot read the run's rows: {error}", where=str(path), fix="restore the file, or train again") from error
    rows, start = [], 0
    for number, length in enumerate(lengths, start=1):
        rows.append(Example(tuple(ids[start : start + length]), tuple(map(bool, mask[start : start + length])), f"{kind} row {number}"))
        start += length
    return tuple(rows), kind == "validation"
