"""Measure a model directory in a process of its own: `python -m finetune.merging.reload DIRECTORY PROBE RESULT DEVICE`.

The process loads the directory with plain transformers, as any user of it would: nothing of the training process, no adapter code and no
cached weights can stand in for what is really on disk. The other side of the comparison, the live adapter model, goes through the same
`measure`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

COMPARED_POSITIONS = 256
"""Supervised positions whose whole logit rows are kept and compared; the loss is taken over all of them."""


class Example(Protocol):
    """A tokenized conversation."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""

    @property
    def mask(self) -> Sequence[bool]:
        """True where a token is supervised, that is, predicted from the ones before it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The token sequences that both models read."""

    ids: Tensor
    """(tokens,) int64, all rows one after the other"""
    lengths: Tensor
    """(rows,) int64"""
    supervised: Tensor
    """(tokens,) bool"""
    compared: Tensor
    """(tokens,) bool, an even choice of the supervised ones"""

    @classmethod
    def of(cls, rows: Sequence[Example], positions: int = COMPARED_POSITIONS) -> Self:
        """All ``rows``, with up to ``positions`` supervised tokens, evenly spread, to compare in full."""
        ids = [token for row in rows for token in row.ids]
        # the first token of a row has nothing before it to be predicted from
        supervised = torch.tensor([bool(flag) and place > 0 for row in rows for place, flag in enumerate(row.mask)], dtype=torch.bool)
        found = supervised.nonzero().flatten()
        compared = torch.zeros_like(supervised)
        compared[found[torch.linspace(0, max(len(found) - 1, 0), min(positions, len(found))).round().long()]] = True
        return cls(torch.tensor(ids, dtype=torch.int64), torch.tensor([len(row.ids) for row in rows]), supervised, compared)

    def save(self, path: Path) -> None:
        """Write the probe as safetensors."""
        save_file({"ids": self.ids, "lengths": self.lengths, "supervised": self.supervised, "compared": self.compared}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        return cls(**load_file(path))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a model makes of a probe."""

    logits: Tensor
    """(compared positions, vocabulary) fp32 on the CPU"""
    loss: float
    """Mean negative log-likelihood of the supervised tokens, nats"""


@torch.no_grad()
def measure(model: Any, probe: Probe, device: torch.device | str) -> Measurement:
    """Run ``model`` (in eval mode, on ``device``) over ``probe`` row by row, unpadded, with the head at supervised positions only."""
    kept: list[Tensor] = []
    total, count = 0.0, 0
    lengths = probe.lengths.tolist()
    parts = (torch.split(part, lengths) for part in (probe.ids, probe.supervised, probe.compared))
    for ids, supervised, compared in zip(*parts, strict=True):
        targets = supervised.nonzero().flatten()
        if not len(targets):
            continue
        logits = _logits(model, ids.to(device), (targets - 1).to(device)).float()
        total += float(functional.cross_entropy(logits, ids[targets].to(device), reduction="sum"))
        count += len(targets)
        kept.append(logits[compared[targets].to(device)].cpu())
    return Measurement(torch.cat(kept), total / count)


def _logits(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """(positions, vocabulary): logits of one row (tokens,) at ``positions``."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(core.forward).parameters:
        logits: Tensor = model(input_ids=ids[None], use_cache=False, logits_to_keep=positions).logits[0]
        return logits
    whole: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return whole[positions]


def main(arguments: Sequence[str]) -> int:
    """Entry point of the process; prints what is wrong with the directory and returns 6 where weights are missing or left over."""
    from transformers import AutoModelForCausalLM

    directory, probe, result, device = arguments
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, device_map={"": device}, trust_remote_code=False, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        sys.stderr.write(f"the weights do not match the configuration: {wrong}\n")
        return 6
    found = measure(model.eval(), Probe.load(Path(probe)), device)
    save_file({"logits": found.logits, "loss": torch.tensor(found.loss, dtype=torch.float64)}, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
