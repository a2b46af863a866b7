"""Tokenized rows in a file of the run, so that evaluation and merging need neither the data nor the split again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from finetune.data.examples import Examples, Flat
from finetune.data.render import Example
from finetune.errors import VerificationError

_PROBE_ROWS = 64


def save_rows(path: Path, train: Examples, validation: Examples) -> None:
    """Write the validation rows, or where there are none the first training rows, by which a merge can still be checked."""
    rows = validation or train[:_PROBE_ROWS]
    flat = Flat.of(rows)
    tensors: dict[str, npt.NDArray[Any]] = {"ids": flat.ids, "mask": flat.mask.astype(np.uint8), "lengths": np.diff(flat.offsets)}
    save_file(tensors, path, {"kind": "validation" if validation else "training"})


def load_rows(path: Path) -> tuple[tuple[Example, ...], bool]:
    """The rows, and whether they are validation rows; VerificationError where the file is missing or damaged."""
    try:
        with safe_open(path, "np") as file:
            kind = (file.metadata() or {})["kind"]
            ids, mask, lengths = (file.get_tensor(name) for name in ("ids", "mask", "lengths"))
    except (OSError, SafetensorError, KeyError) as error:
        raise VerificationError(f"cannot read the run's rows: {error}", where=str(path), fix="restore the file, or train again") from error
    bounds = pairwise([0, *np.cumsum(lengths).tolist()])
    flags = mask.astype(bool)
    rows = [
        Example(tuple(ids[left:right].tolist()), tuple(flags[left:right].tolist()), f"{kind} row {number}")
        for number, (left, right) in enumerate(bounds, start=1)
    ]
    return tuple(rows), kind == "validation"
